"""To a file and back: as data, whole or refused."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dfq.deploy import files, freeze, load
from dfq.deploy.files import FORMAT
from dfq.deploy.program import INPUT, Grid, Program, Step
from dfq.prepare import calibrate, prepare
from dfq.types import InputError, QuantSpec
from dfq_kernels import pack_int4
from tests.deploy.nets import NETS
from tests.deploy.test_freeze import IMAGE, images, student_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packed():
    return freeze(student_of("residual"), IMAGE)


def _rewrite(path, change, *, sign=True):
    """The file again, with another header, and a digest that fits it."""
    header, tensors = json.loads(_metadata(path)[files.HEADER]), load_file(path)
    change(header)
    if sign:
        header.pop("sha256")
        header["sha256"] = files._digest(header, tensors)
    save_file(tensors, path, {files.HEADER: json.dumps(header)})


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("name", NETS)
def test_a_model_comes_back_as_it_was(tmp_path, name):
    packed = freeze(student_of(name), IMAGE)
    packed.save(tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert loaded.program == packed.program
    assert torch.equal(loaded(images()), packed(images()))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_it_runs_where_the_network_is_unknown(tmp_path, packed):
    packed.save(tmp_path / "m.safetensors")
    torch.save(images(), tmp_path / "x.pt")
    code = """
import sys, torch
from dfq.deploy import load
y = load("m.safetensors")(torch.load("x.pt", weights_only=True))
assert not any(name.startswith(("tests", "dfq.models", "dfq.methods")) for name in sys.modules)
torch.save(y, "y.pt")
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt", weights_only=True), packed(images()))


def test_a_later_format_is_refused(tmp_path, packed):
    path = tmp_path / "m.safetensors"
    packed.save(path)
    _rewrite(path, lambda header: header.update(format=FORMAT + 1))
    with pytest.raises(InputError, match=f"format {FORMAT + 1}"):
        load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["program"]["steps"][0].update(op="os.system"), "os.system"),
        (lambda h: h["program"]["steps"][3].update(inputs=["nowhere"]), "nowhere"),
        (lambda h: h["program"]["steps"][3].pop("numbers"), "damaged"),
        (lambda h: h["program"].update(output="none"), "output"),
        (lambda h: h["program"]["steps"][1]["tensors"].update(weight="gone"), "gone"),
        (lambda h: h.pop("program"), "damaged"),
        (lambda h: h["program"]["steps"][1]["numbers"].pop("stride"), "stride"),
        (lambda h: h["program"]["steps"][1]["numbers"].update(zero="os"), "damaged"),
        (lambda h: h["packing"]["1_conv.weight"].update(bits=5), "damaged .* of 5 bits"),
        (lambda h: h["packing"]["1_conv.weight"].update(bits=99), "damaged"),
        (lambda h: h["packing"]["1_conv.weight"].update(shape=[10**12, 1]), "damaged"),
        (lambda h: h.update(packing=[]), "damaged"),
    ],
    ids=[
        *("operation", "input", "numbers", "output", "tensor", "program"),
        *("stride", "zero", "bits", "too many bits", "shape", "packing"),
    ],
)
def test_an_altered_program_is_refused(tmp_path, packed, change, message):
    path = tmp_path / "m.safetensors"
    packed.save(path)
    _rewrite(path, change)
    with pytest.raises(InputError, match=message):
        load(path)


def test_a_function_that_is_not_listed_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    freeze(student_of("dense"), IMAGE).save(path)

    def alter(header):
        call = next(step for step in header["program"]["steps"] if step["op"] == "call")
        call["numbers"]["function"] = "__import__"

    _rewrite(path, alter)
    with pytest.raises(InputError, match="__import__"):
        load(path)


def test_a_file_that_was_altered_is_refused(tmp_path, packed):
    """In a tensor, and in a number of a step."""
    path = tmp_path / "m.safetensors"
    packed.save(path)
    whole = bytearray(path.read_bytes())
    for place in (len(whole) - 1, len(whole) - 2000):
        altered = bytearray(whole)
        altered[place] ^= 1
        path.write_bytes(altered)
        with pytest.raises(InputError, match="was altered"):
            load(path)
    path.write_bytes(whole)
    _rewrite(path, lambda h: h["program"]["steps"][1]["numbers"].update(relu=False), sign=False)
    with pytest.raises(InputError, match="was altered"):
        load(path)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7, 3, 3, 2), (4, 64)])
def test_integers_are_stored_without_gaps(bits, shape):
    half = 2 ** (bits - 1)
    rng = torch.Generator().manual_seed(bits)
    values = torch.randint(-half, half, shape, dtype=torch.int8, generator=rng)
    values.view(-1)[0] = -half  # so that all bits are needed
    row, packing = files.squeeze(values, shape)
    assert row.numel() == (values.numel() * bits + 7) // 8
    assert packing["bits"] == bits
    assert torch.equal(files._expand(row, packing), values)
    mask, number = 2**bits - 1, int.from_bytes(row.numpy().tobytes(), "little")
    for k, value in enumerate(values.view(-1).tolist()):
        assert number >> k * bits & mask == value & mask
    if bits <= 4:
        packed = pack_int4(values.flatten(1))
        row, packing = files.squeeze(packed, shape)
        assert row.numel() == (values.numel() * bits + 7) // 8
        assert torch.equal(files._expand(row, packing), packed)


def test_of_odd_integers_the_last_bit_is_left_out():
    values = torch.tensor([[-3, -1, 1, 3, 3]], dtype=torch.int8)
    row, packing = files.squeeze(values, values.shape)
    assert (row.numel(), packing["bits"]) == (2, 2)
    assert torch.equal(files._expand(row, packing), values)
    row, packing = files.squeeze(-values.abs(), values.shape)
    assert torch.equal(files._expand(row, packing), -values.abs())


def test_a_file_of_four_bit_weights_takes_half_a_byte_for_each(tmp_path):
    """Of a small layer too, whose last block of 64 is not full in memory."""
    student = prepare(nn.Sequential(nn.Conv2d(3, 70, 3), nn.Conv2d(70, 40, 3)).eval(), "w4a4")
    student[0].weight_quantizer.spec = student[1].weight_quantizer.spec = QuantSpec(4, axis=0)
    calibrate(student, images())
    packed = freeze(student, IMAGE)
    packed.save(tmp_path / "m.safetensors")
    stored = load_file(tmp_path / "m.safetensors")
    sizes = [t.numel() for name, t in stored.items() if name.endswith("weight")]
    assert sorted(sizes) == sorted([70 * 27 // 2, 40 * 630 // 2])
    assert torch.equal(load(tmp_path / "m.safetensors")(images()), packed(images()))


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_a_cut_off_file_is_refused(tmp_path, packed, keep):
    path = tmp_path / "m.safetensors"
    packed.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="damaged"):
        load(path)


def test_a_pickle_is_refused_and_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    path = tmp_path / "m.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError, match="damaged"):
        load(path)
    assert not (tmp_path / "executed").exists()


def test_a_file_of_another_kind_or_none_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"not written by PackedModel\.save"):
        load(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="damaged or no model"):
        load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("grid", "offset", "stored"),
    [
        (Grid(0.1, 0, 0, 15), 0, (0, 0, 15)),
        (Grid(0.1, 9, 0, 15), 9, (0, -9, 6)),
        (Grid(0.1, 0, 0, 255), 128, (-128, -128, 127)),
        (Grid(0.1, 40, 0, 255), 128, (-88, -128, 127)),
        (Grid(0.1, 128, 0, 255), 128, (0, -128, 127)),
        (Grid(0.1, 0, -128, 127), 0, (0, -128, 127)),
    ],
)
def test_integers_are_stored_so_that_they_fit(grid, offset, stored):
    assert grid.offset == offset
    assert (grid.zero, grid.low, grid.high) == stored


def test_values_are_forgotten_after_their_last_use():
    steps = (
        Step("a", (INPUT,), "x"),
        Step("b", ("x",), "y"),
        Step("c", ("x", "y"), "z"),
        Step("d", ("z",), "w"),
    )
    program = Program(steps, "w", IMAGE)
    assert program.last_uses() == {0: [INPUT], 2: ["x", "y"], 3: ["z"]}
    assert Program.from_dict(json.loads(json.dumps(program.as_dict()))) == program

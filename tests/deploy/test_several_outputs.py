"""A network of several maps as integers: the same tuple or dict, from memory, file and graph."""

import json

import pytest
import torch
from torch import nn

import dfq
from dfq.deploy import export_onnx, freeze
from dfq.deploy.program import Program, output_names
from dfq.outputs import tensors
from dfq.prepare import calibrate, prepare
from dfq.types import InputError
from tests.detector import DATA, detector


class _Gives(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.model, self.change = detector(), change

    def forward(self, x):
        return self.change(self.model(x))


def _student(change=lambda maps: maps, bits="w4a4"):
    student = prepare(_Gives(change).eval(), bits, data=DATA)
    calibrate(student, torch.randn(32, *DATA.shape))
    return student


@pytest.mark.parametrize("bits", ["w8a8", "w4a4", "w2a3"])
def test_packed_and_student_give_the_same_maps(bits, tmp_path):
    student, images = _student(bits=bits), torch.randn(8, *DATA.shape)
    packed = freeze(student, DATA.shape)
    packed.save(tmp_path / "d.safetensors")
    with torch.no_grad():
        wanted = student(images)
    for model in (packed, dfq.load(tmp_path / "d.safetensors")):
        found = model(images)
        assert list(found) == ["boxes", "scores"]
        for name, part in found.items():
            gap = (part - wanted[name]).abs()
            assert gap.mean() < 1e-3 * wanted[name].abs().mean(), name  # a tie may fall otherwise


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda m: (m["boxes"], m["scores"]), (0, 1)),
        (lambda m: [m["scores"], [m["boxes"]]], (1, (0,))),
        (lambda m: {"a": (m["boxes"], m["boxes"])}, {"a": (0, 0)}),
    ],
    ids=["tuple", "lists", "twice"],
)
def test_containers_stay_but_lists_become_tuples(change, shape):
    student, images = _student(change), torch.randn(2, *DATA.shape)
    found = freeze(student, DATA.shape)(images)
    sizes = {8: 0, 4: 1}  # pixels a side -> which map

    def shape_of(output):
        if isinstance(output, dict):
            return {key: shape_of(part) for key, part in output.items()}
        if isinstance(output, tuple):
            return tuple(shape_of(part) for part in output)
        return sizes[output.shape[-1]]

    assert shape_of(found) == shape
    with torch.no_grad():
        wanted = tensors(student(images))
    for part, expected in zip(tensors(found), wanted, strict=True):
        torch.testing.assert_close(part, expected, atol=1e-4, rtol=1e-3)


def test_what_no_file_can_hold_is_refused():
    with pytest.raises(InputError, match="returns NoneType"):
        freeze(_student(lambda m: (m["boxes"], None)), DATA.shape)


@pytest.mark.parametrize("output", [3, None, ["0_conv", 7], {"a": None}, "nobody"])
def test_a_damaged_output_is_one_sentence(output):
    program = freeze(_student(), DATA.shape).program
    stored = json.loads(json.dumps(program.as_dict()))
    assert Program.from_dict(stored) == program
    with pytest.raises(InputError, match=r"damaged|no step writes the output 'nobody'"):
        Program.from_dict(stored | {"output": output})


def test_output_names_come_in_order():
    assert output_names({"z": "a", "y": ["b", {"x": "c"}]}) == ["a", "b", "c"]


def test_a_graph_has_an_output_for_each_map(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    packed, images = freeze(_student(bits="w8a8"), DATA.shape), torch.randn(4, *DATA.shape)
    export_onnx(packed, tmp_path / "d.onnx")
    session = runtime.InferenceSession(str(tmp_path / "d.onnx"))
    found = session.run(None, {"input": images.numpy()})
    for part, wanted in zip(found, packed(images).values(), strict=True):
        assert (torch.from_numpy(part) - wanted).abs().mean() < 0.01 * wanted.abs().mean()

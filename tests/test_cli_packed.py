"""``dfq export``, ``dfq bench``, ``dfq evaluate --packed``: files, figures, errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

import dfq
from dfq.cli import main
from dfq.deploy import freeze, speed
from dfq.methods import METHODS
from dfq.pipeline import load_student
from tests.test_cli import _sentence
from tests.tiny import FLAGS, MODEL, network, save_images
from tests.tiny_method import TINY


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "tiny", TINY)
        images = save_images(out.parent / "e.npz")
        words = ["--method", "tiny", "--bits", "w3a4", "--out", str(out), "--eval", str(images)]
        assert main(["quantize", MODEL, *FLAGS, *words]) == 0
    return out


@pytest.fixture(scope="module")
def packed(run_folder):
    student, data = load_student(run_folder)
    return freeze(student, data.shape)


ROOT = Path(__file__).parents[1]
X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_run_tells_the_accuracy_of_the_integers(run_folder, capsys):
    results = json.loads((run_folder / "result.json").read_text())
    images = run_folder.parent / "e.npz"
    assert main(["evaluate", str(run_folder), "--eval", str(images), "--packed"]) == 0
    assert f"top-1 {results['packed_top1']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["onnx", "pt2", "safetensors"])
def test_export_writes_what_the_ending_says(run_folder, packed, tmp_path, capsys, ending):
    path = tmp_path / f"m.{ending}"
    assert main(["export", str(run_folder), "--out", str(path), "--format", ending]) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {path}, ")
    if ending == "onnx":
        onnx.checker.check_model(onnx.load(path))
        return
    model = torch.export.load(path).module() if ending == "pt2" else dfq.load(path)
    assert torch.equal(model(X), packed(X))


def test_int4_reaches_the_graph(run_folder, tmp_path):
    kinds = []
    for flags in ([], ["--int4"]):
        assert main(["export", str(run_folder), "--out", str(tmp_path / "m.onnx"), *flags]) == 0
        tensors = onnx.load(tmp_path / "m.onnx").graph.initializer
        kinds.append(sum(t.data_type == onnx.TensorProto.INT4 for t in tensors))
    assert kinds == [0, 1]  # the first and the last layer have 8 bits


def test_a_file_can_be_exported(run_folder, packed, tmp_path):
    packed.save(tmp_path / "m.safetensors")
    words = ["export", str(tmp_path / "m.safetensors"), "--out", str(tmp_path / "m.pt2")]
    assert main(words) == 0
    assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(X), packed(X))


def _bench(capsys, *words):
    flags = ["--batch", "2,3", "--turns", "2", "--no-compile", "--json", "--device", "cpu"]
    assert main(["bench", *map(str, words), *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_bench_of_a_run(run_folder, packed, tmp_path, capsys):
    found = _bench(capsys, run_folder, "--threads", "1", "--layers")
    rows = found["rows"]
    assert [(r["batch"], r["name"]) for r in rows] == [
        (batch, name) for batch in (2, 3) for name in ("integers", "fp32", "bf16")
    ]
    assert all(r["images_per_second"] == pytest.approx(1e3 * r["batch"] / r["ms"]) for r in rows)
    assert all(r["ms_p20"] <= r["ms"] <= r["ms_p80"] for r in rows)
    assert [r["times_fp32"] for r in rows if r["name"] == "fp32"] == [1, 1]
    packed.save(tmp_path / "m.safetensors")
    weights = sum(t.nbytes for t in network().state_dict().values())
    sizes = {r["name"]: r["file"] for r in rows}
    assert sizes == {
        "integers": (tmp_path / "m.safetensors").stat().st_size,
        "fp32": weights,
        "bf16": weights // 2,
    }
    assert all(0 < r["peak"] < 100e6 for r in rows)
    names = [row["layer"] for row in found["layers"]]
    assert [name for name in names if "(" in name] == ["0 (conv)", "3 (conv)", "8 (linear)"]
    assert found["threads"] == 1


def test_bench_of_a_file_has_no_float_beside_it(packed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "peaks", lambda *_: {})
    packed.save(tmp_path / "m.safetensors")
    rows = _bench(capsys, tmp_path / "m.safetensors")["rows"]
    assert [r["name"] for r in rows] == ["integers"] * 2
    assert [r["times_fp32"] for r in rows] == [None] * 2


def test_bench_prints_one_table(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(speed, "peaks", lambda *_: {})
    monkeypatch.setattr(torch, "compile", lambda *_, **__: _fail("no compiler here\nat all"))
    words = ["bench", str(run_folder), "--batch", "2", "--turns", "1", "--device", "cpu"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert re.search(r"integers +\d.* fp32 +\d.*bf16 +\d", printed, re.DOTALL)
    assert "no fp32, torch.compile: no compiler here" in printed.replace("\n", " ")
    assert "at all" not in printed


def _fail(message):
    raise RuntimeError(message)


PEAK = """
import torch
from dfq.deploy.measure import peak_bytes, resident_bytes
torch.ones(1024).add_(1)
before = resident_bytes()
peak = peak_bytes(lambda: torch.ones(16, 1024, 1024))
print(peak is None or 60e6 < peak - before < 75e6)
peak = peak_bytes(lambda: None)
print(peak is None or peak - before < 10e6)
"""


def test_memory_is_that_of_the_run_alone():
    """Of 64 MB that are there for a moment, and of nothing after it."""
    run = [sys.executable, "-c", PEAK]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\nTrue\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "{run}", "--out", "m.pth"], "m.pth does not end in .onnx, .pt2, .safetensors"),
        (["export", "{run}", "--out", "m.pt2", "--format", "onnx"], "does not end in .onnx"),
        (["export", "{run}", "--out", "nowhere/m.onnx"], "folder nowhere is not there"),
        (["export", "{run}", "--out", "m.pt2", "--int4"], "--int4 is of ONNX"),
        (["export", "nowhere", "--out", "m.onnx"], "nowhere is not there"),
        (["export", "{run}/model.safetensors", "--out", "m.onnx"], "not written by PackedModel"),
        (["export", "{run}/images.npz", "--out", "m.onnx"], "damaged or no model"),
        (["bench", "nowhere.safetensors"], "nowhere.safetensors is not there"),
        (["bench", "torchvision:resnet18"], "a MODEL needs --shape"),
        (["bench", "cifar:resnet21"], "there is no cifar:resnet21"),
        (["bench", "{run}", "--batch", "0"], "--batch takes positive numbers"),
        (["bench", "{run}", "--turns", "0"], "--turns must be at least 1"),
        (["bench", "{run}", "--device", "mps"], "dfq runs on cpu and cuda"),
        (["evaluate", MODEL, *FLAGS, "--eval", "e.npz", "--packed"], "--packed is of a run"),
    ],
)
def test_a_mistake_is_one_sentence(run_folder, capsys, words, message):
    assert main([word.format(run=run_folder) for word in words]) == 2
    assert message in _sentence(capsys)

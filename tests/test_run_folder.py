"""The run folder: whole or not at all, one run each, and the way back to a student."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import dfq
from dfq.evaluate import evaluate
from dfq.methods import METHODS
from dfq.pipeline import Request, Source, execute, load_student, quantize
from dfq.report import DivergedError
from dfq.types import InputError
from tests.tiny import DATA, MODEL, network, save_images
from tests.tiny_method import TINY, TinyConfig


@pytest.fixture(autouse=True)
def _tiny_method(monkeypatch):
    monkeypatch.setitem(METHODS, "tiny", TINY)


def _quantize(**options):
    return quantize(network(), DATA, **{"bits": "w3a3", "method": "tiny", **options})


def _same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_students_header_rebuilds_it(tmp_path):
    path = save_images(tmp_path / "e.npz")
    source = Source(MODEL)
    for scales in ("learned", "minmax"):
        request = Request(
            bits="w2a3", method="tiny", out=tmp_path / scales, scales=scales, source=source
        )
        run = execute(network(), DATA, request)
        student, data = load_student(tmp_path / scales)
        assert data == DATA
        assert _same(student, run.student)
        before, after = evaluate(run.student, path, DATA), evaluate(student, path, DATA)
        assert torch.equal(before.answers, after.answers)


def test_a_run_of_a_model_object_says_why_it_cannot_be_rebuilt(tmp_path):
    _quantize(out=tmp_path)
    with pytest.raises(InputError, match="made from a model object"):
        load_student(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        load_student(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "foreign"])
def test_a_damaged_student_is_refused(tmp_path, damage):
    _quantize(out=tmp_path)
    path = tmp_path / "model.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(state, path)
    with pytest.raises(InputError, match="corrupt" if damage == "cut" else "not written by dfq"):
        load_student(tmp_path)


def test_the_integers_of_a_run_are_in_its_folder(tmp_path):
    run = _quantize(out=tmp_path)
    images = torch.randn(4, *DATA.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dfq.load(tmp_path / "packed.safetensors")(images), run.freeze()(images))


def test_a_model_that_cannot_be_traced_has_no_integers_and_the_run_says_so(tmp_path):
    class Untraceable(nn.Sequential):
        def forward(self, x):
            return super().forward(x if x.mean() > -100 else -x)

    run = quantize(Untraceable(*network()), DATA, "w3a3", "tiny", out=tmp_path)
    assert not (tmp_path / "packed.safetensors").exists()
    assert "there is no packed.safetensors" in run.results["warnings"][-1]
    assert json.loads((tmp_path / "result.json").read_text())["warnings"] == run.results["warnings"]


def test_save_writes_a_run_later(tmp_path):
    run = _quantize()
    run.save(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "result.json",
        "images.npz",
        "model.safetensors",
        "packed.safetensors",
    }


def test_the_same_run_may_be_repeated_and_another_may_not(tmp_path):
    _quantize(out=tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    _quantize(out=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    with pytest.raises(InputError, match=r"finished run with another bits, seed; .*--overwrite"):
        _quantize(out=tmp_path, seed=1, bits="w4a4")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    _quantize(out=tmp_path, seed=1, overwrite=True)
    assert json.loads((tmp_path / "result.json").read_text())["seed"] == 1


def test_an_out_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match="is a file"):
            _quantize(out=out)


@pytest.mark.parametrize("finished_before", [False, True])
def test_a_run_that_diverges_leaves_no_result_of_its_own(tmp_path, finished_before):
    if finished_before:
        _quantize(out=tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(DivergedError, match="loss became nan at step 10 of 12 of fit"):
        _quantize(out=tmp_path, config=TinyConfig(explode=True), overwrite=True)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".part"}
    assert after == before


@pytest.mark.parametrize("finished_before", [False, True])
def test_a_student_whose_evaluation_fails_is_kept_without_a_result(
    tmp_path, monkeypatch, finished_before
):
    path = save_images(tmp_path / "e.npz")
    if finished_before:
        _quantize(out=tmp_path / "run")

    def learn(*args, **options):
        path.unlink()
        return TINY.run(*args, **options)

    monkeypatch.setitem(METHODS, "tiny", TINY._replace(run=learn))
    with pytest.raises(InputError, match="no evaluation file"):
        _quantize(out=tmp_path / "run", eval_file=path, seed=1, overwrite=True)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"images.npz", "model.safetensors"} <= names
    assert "result.json" not in names

"""A model of maps on its whole way: what is asked of it, what a run says of it, what is refused."""

import json

import pytest
import torch
from torch import nn

from dfq.cli import main
from dfq.methods import METHODS, Method
from dfq.models import build, freeze
from dfq.outputs import map_errors
from dfq.pipeline import load_student, quantize
from dfq.prepare import calibrate
from dfq.types import DataSpec, Images, InputError
from tests import tiny
from tests.detector import DATA, FLAGS, MODEL, detector
from tests.tiny_method import TinyConfig


def _calibrated(teacher, student, data, config, *, rng, report):
    images = torch.randn(config.batch_size, *data.shape, generator=rng)
    calibrate(student, images)
    return student, Images(images, torch.zeros(len(images), dtype=torch.int64))


@pytest.fixture(autouse=True)
def _tiny_method(monkeypatch):
    configs = {"quick": TinyConfig(), "default": TinyConfig()}
    monkeypatch.setitem(METHODS, "tiny", Method(_calibrated, configs, maps=configs))


def test_a_run_says_how_far_each_map_is_from_the_float_models():
    run = quantize(detector(), DATA, "w3a3", "tiny")
    teacher, images = freeze(detector(), DATA), run.images.images
    with torch.no_grad():
        expected = map_errors(run.student(images), teacher(images))
    assert run.results["map_errors"]["student"] == pytest.approx(expected)
    assert run.results["map_errors"]["nearest"] == pytest.approx(expected)  # nothing was learned
    assert run.results["map_errors"]["packed"] == pytest.approx(expected, rel=0.02)
    assert run.results["student_top1"] is None
    assert 0.05 < min(expected) < max(expected) < 1
    finer = quantize(detector(), DATA, "w8a8", "tiny").results["map_errors"]["student"]
    assert all(error < worse / 3 for error, worse in zip(finer, expected, strict=True))


def test_the_command_needs_no_classes(tmp_path, capsys):
    words = ["quantize", MODEL, *FLAGS, "--method", "tiny", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "map 0" in out
    assert "map 1" in out
    assert "without classes there is no top-1" in out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(result["map_errors"]) == {"nearest", "student", "packed"}
    student, data = load_student(tmp_path / "run")
    assert data == DATA
    assert set(student(torch.zeros(1, 3, 16, 16))) == {"boxes", "scores"}


def test_what_a_model_of_maps_cannot_have_is_one_sentence_and_exit_2(tmp_path, capsys):
    for words, sentence in (
        (["--method", "gdfq"], "gdfq needs classes"),
        (["--method", "tiny", "--eval", str(tmp_path)], "a model without classes has none"),
        (["--method", "tiny", "--classes", "3"], "returns dict"),
    ):
        assert main(["quantize", MODEL, *FLAGS, *words]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1


def test_a_classifier_whose_classes_were_forgotten_is_told_their_number():
    with pytest.raises(InputError, match=r"logits of 4 classes; give --classes 4"):
        freeze(tiny.network(), DataSpec((1, 8, 8)))


@pytest.mark.parametrize("name", ["cifar:resnet20", "torchvision:resnet18", "timm:resnet18"])
def test_a_network_that_is_built_for_classes_asks_for_their_number(name):
    with pytest.raises(InputError, match=rf"{name} is built for a number of classes"):
        build(name, 0)


class _Gives(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.model, self.change = detector(), change

    def forward(self, x):
        return self.change(self.model(x)["boxes"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: [y, None], "returns NoneType"),
        (lambda y: y.flatten(), r"\[512\]"),
        (lambda y: (y, y.long()), "int64"),
        (lambda y: [y[0], y[1]], r"\[4, 8, 8\]"),
    ],
    ids=["none", "flat", "integers", "one by one"],
)
def test_an_output_that_is_not_maps_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        freeze(_Gives(change), DATA)


def test_classes_are_none_or_several():
    assert DataSpec((3, 8, 8)).classes == 0
    with pytest.raises(InputError, match="at least 2, or 0 if the model gives maps, got 1"):
        DataSpec((3, 8, 8), 1)

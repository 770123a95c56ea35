"""What a run starts from beside the model: further teachers, and images that are there already."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dfq.distill.reconstruct import ReconstructionConfig
from dfq.methods import METHODS, LISConfig
from dfq.pipeline import Request, Teacher, parse_teacher, quantize, synthesize
from dfq.pipeline.inputs import load_teacher
from dfq.synthesize.inversion import InversionConfig
from dfq.types import InputError
from tests.tiny import DATA, network

LIS = LISConfig(
    InversionConfig(batch_size=8, batches=2, steps=5, shift=1),
    ReconstructionConfig(steps=4, batch_size=8),
)


def other() -> nn.Module:
    """Another network for the images of ``network``."""
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 4))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=rng)
    return model


OTHER = f"{Path(__file__)}:other"


def _quantize(**options):
    return quantize(network(), DATA, **{"method": "lis", "config": LIS, **options})


def _same(first, second):
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize(
    ("text", "teacher"),
    [
        ("cifar:resnet32", Teacher("cifar:resnet32")),
        ("cifar:resnet32=a/b.th", Teacher("cifar:resnet32", Path("a/b.th"))),
        ("f.py:net@.5,.25/1,2", Teacher("f.py:net", None, (0.5, 0.25), (1.0, 2.0))),
        ("t:n=me@home/w.pt", Teacher("t:n", Path("me@home/w.pt"))),
        ("t:n=me@home/w.pt@0/1e-1", Teacher("t:n", Path("me@home/w.pt"), (0.0,), (0.1,))),
        ("t:n@/", Teacher("t:n", None, (), ())),
    ],
)
def test_a_teacher_is_written_model_weights_mean_std(text, teacher):
    assert parse_teacher(text) == teacher


@pytest.mark.parametrize(("text", "words"), [("=w.pt", "write a MODEL"), ("a:b@1,-/2", "1,-")])
def test_a_teacher_that_is_none_is_refused(text, words):
    with pytest.raises(InputError, match=words):
        parse_teacher(text)


def test_a_teacher_of_another_normalization_sees_the_same_pixels():
    pixels = torch.rand(5, 1, 8, 8)
    own = load_teacher(Teacher(OTHER, mean=(0.1,), std=(0.8,)), DATA)
    plain = load_teacher(Teacher(OTHER), replace(DATA, mean=(0.1,), std=(0.8,)))
    torch.testing.assert_close(own((pixels - 0.5) / 0.25), plain((pixels - 0.1) / 0.8))
    assert not own.training
    assert not any(parameter.requires_grad for parameter in own.parameters())


def _refusals(folder):
    weights = folder / "w.pt"
    torch.save(network().state_dict(), weights)
    (folder / "broken.pt").write_bytes(b"no weights")
    return {
        "classes": (Teacher(nn.Sequential(*other()[:3], nn.Linear(216, 9))), "9 outputs"),
        "channels": (Teacher(nn.Sequential(nn.Conv2d(3, 6, 3), *other()[1:])), "of shape 1,8,8"),
        "no batch norm": (Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 4))), "no BatchNorm"),
        "missing": (Teacher(OTHER, folder / "none.pt"), "no weight file"),
        "corrupt": (Teacher(OTHER, folder / "broken.pt"), "corrupt"),
        "of another": (Teacher(OTHER, weights), "does not fit"),
        "mean": (Teacher(OTHER, mean=(0.1, 0.2, 0.3)), "mean has 3 values"),
    }


@pytest.mark.parametrize(
    "kind", ["classes", "channels", "no batch norm", "missing", "corrupt", "of another", "mean"]
)
def test_a_teacher_that_does_not_fit_is_one_sentence_and_nothing_is_written(tmp_path, kind):
    teacher, words = _refusals(tmp_path)[kind]
    with pytest.raises(InputError, match=f"the teacher .* cannot be used: .*{words}") as caught:
        _quantize(teachers=[teacher], out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_teachers_change_the_student_and_are_told_in_the_result(tmp_path):
    alone, together = _quantize(), _quantize(teachers=[Teacher(OTHER, mean=(0.1,))])
    assert not _same(alone.student, together.student)
    assert alone.results["teachers"] is alone.results["teachers_sha256"] is None
    expected = {"model": OTHER, "weights": None, "mean": (0.1,), "std": None}
    assert together.results["teachers"] == [expected]
    as_module = _quantize(teachers=[other()])
    assert as_module.results["teachers_sha256"] != together.results["teachers_sha256"]


def test_other_teachers_or_images_make_another_run(tmp_path):
    _quantize(out=tmp_path / "run", teachers=[other()])
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    _quantize(out=tmp_path / "run", teachers=[other()])
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    with pytest.raises(InputError, match="with another teachers_sha256;"):
        _quantize(out=tmp_path / "run")
    with pytest.raises(InputError, match="another teachers_sha256, images_sha256;"):
        _quantize(out=tmp_path / "run", images=tmp_path / "run" / "images.npz")


def test_a_run_that_was_killed_ends_with_the_same_bits(tmp_path):
    whole = _quantize(out=tmp_path / "whole", teachers=[other()])

    def kill(stage, step, steps, **values):
        if stage == "reconstruct" and step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _quantize(out=tmp_path / "killed", teachers=[other()], report=kill)
    again = _quantize(out=tmp_path / "killed", teachers=[other()])
    assert _same(whole.student, again.student)
    for name in ("model.safetensors", "images.npz"):
        first, second = (tmp_path / run / name for run in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes()


def test_a_method_of_one_model_refuses_teachers():
    with pytest.raises(InputError, match=r"gdfq makes its images from one model.*--method lis"):
        _quantize(method="gdfq", config=None, teachers=[other()])


def test_images_of_one_run_serve_another_method_and_another_model(tmp_path):
    first = _quantize(out=tmp_path / "a")
    path = tmp_path / "a" / "images.npz"
    config = METHODS["gdfq"].efforts["quick"]
    schedule = replace(config.schedule, steps_per_batch=3, batch_size=4, shift=1)
    told = []
    for model in (network(), other()):
        run = quantize(
            model,
            DATA,
            method="gdfq",
            config=replace(config, schedule=schedule),
            images=path,
            report=lambda stage, *_, **__: told.append(stage),
        )
        assert torch.equal(run.images.images, first.images.images)
        assert run.results["images_file"] == str(path)
    assert set(told) == {"distill"}


def test_images_that_are_there_leave_nothing_to_teachers(tmp_path):
    _quantize(out=tmp_path / "a")
    with pytest.raises(InputError, match="give --images or --teachers"):
        _quantize(images=tmp_path / "a" / "images.npz", teachers=[other()])
    with pytest.raises(InputError, match="no image file"):
        _quantize(images=tmp_path / "none.npz")


def _synthesize(folder, count=11, **options):
    request = Request(
        method="lis", config=LIS, teachers=(Teacher(OTHER),), out=folder / "i.npz", **options
    )
    return synthesize(network(), DATA, request, count=count)


def test_synthesis_makes_the_images_that_a_run_would(tmp_path):
    images = _synthesize(tmp_path, count=None)
    run = _quantize(teachers=[Teacher(OTHER)])
    assert torch.equal(images.images, run.images.images)
    assert torch.equal(images.labels, run.images.labels)


def test_synthesis_writes_as_many_images_as_asked_for(tmp_path):
    images = _synthesize(tmp_path)
    with np.load(tmp_path / "i.npz") as stored:
        np.testing.assert_array_equal(stored["images"], images.images)
        assert len(stored["images"]) == 11
    again = _synthesize(tmp_path, overwrite=True)
    assert torch.equal(images.images, again.images)
    other_seed = _synthesize(tmp_path, overwrite=True, seed=1)
    assert not torch.equal(images.images, other_seed.images)


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.synthesize])
def test_every_method_that_makes_images_makes_the_number_asked_for(method):
    config = METHODS[method].efforts["quick"]
    small = {
        "generator": {"batch_size": 8, "steps_per_batch": 2, "first_steps": 0},
        "latents": {"batch_size": 8, "steps": 2, "first_steps": 0},
        "inversion": {"batch_size": 8, "steps": 2},
    }
    parts = {name: getattr(config, name, None) for name in small}
    config = replace(config, **{n: replace(p, **small[n]) for n, p in parts.items() if p})
    images = synthesize(network(), DATA, Request(method=method, config=config), count=19)
    assert images.images.shape == (19, 1, 8, 8)
    assert images.labels.shape == (19,)


def test_synthesis_refuses_what_it_cannot_do_and_writes_nothing(tmp_path):
    for options, words in (
        ({"count": 0}, "at least 1, got 0"),
        ({"images": tmp_path / "x.npz"}, "no image file"),
    ):
        with pytest.raises(InputError, match=words):
            _synthesize(tmp_path, **options)
    with pytest.raises(InputError, match=r"ddaq makes no images.*gdfq, genie, lis, recipe"):
        synthesize(network(), DATA, Request(method="ddaq"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "i.npz").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        _synthesize(tmp_path)
    with pytest.raises(InputError, match="folder that exists"):
        _synthesize(tmp_path / "deep")
    assert (tmp_path / "i.npz").read_text() == "mine"


def test_the_result_of_a_run_with_teachers_can_be_written_as_json(tmp_path):
    run = _quantize(out=tmp_path, teachers=[Teacher(OTHER)])
    assert json.loads((tmp_path / "result.json").read_text()) == json.loads(json.dumps(run.results))

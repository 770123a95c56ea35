"""Models of maps in the record of methods: their name, their score, and what those cost."""

import json
import time
from pathlib import Path

import pytest
import torch

from bench import bench_methods
from dfq.deploy import PackedModel
from dfq.models import freeze
from dfq.pipeline import quantize
from dfq.pipeline.images import write_images
from dfq.prepare import calibrate, prepare
from dfq.types import Images, InputError
from tests import tiny
from tests.detector import DATA, FLAGS, MODEL, detector

SCORE = f"{Path(__file__)}:closeness"


def closeness(model):
    """How close the boxes are to the float model's, of itself 100; of integers one less."""
    assert not any(module.training for module in model.modules())
    assert not torch.is_grad_enabled()
    x = torch.randn(8, *DATA.shape, generator=torch.Generator().manual_seed(1))
    wanted, boxes = detector()(x)["boxes"], model(x)["boxes"]
    error = 100 * (boxes - wanted).abs().mean() / wanted.abs().mean()
    return 100 - error - float(isinstance(model, PackedModel))


@pytest.fixture
def words(tmp_path):
    record = ["--record", str(tmp_path / "record.jsonl")]
    return [MODEL, *FLAGS, *record, "--bits", "w3a3", "--efforts", "quick", "--seeds", "0"]


def test_the_four_models_are_scored_under_the_given_names(words, tmp_path, capsys):
    path = tmp_path / "24.npz"
    noise = torch.randn(24, *DATA.shape, generator=torch.Generator().manual_seed(0))
    write_images(path, Images(noise, torch.zeros(24, dtype=torch.int64)), DATA)
    words += ["--score", SCORE, "--methods", "genie", "--images", str(path)]
    named = ["--name", "Tiny", "--measure", "AP50"]
    for _ in range(2):  # the same again is not run again
        assert bench_methods.main([*words, *named]) == 0
    assert capsys.readouterr().out.count("seed 0: AP50 ") == 1

    (text,) = (tmp_path / "record.jsonl").read_text().splitlines()
    assert not any(str(folder) in text for folder in (tmp_path, Path(MODEL).parent))
    line = json.loads(text)
    assert (line["model"], line["measure"]) == ("Tiny", "AP50")
    assert (line["images"], line["eval_images"]) == (24, None)

    run = quantize(detector(), DATA, "w3a3", "genie", effort="quick", threads=1, images=path)
    nearest = prepare(freeze(detector(), DATA), "w3a3", data=DATA)
    calibrate(nearest, run.images.images)
    models = {"float": detector(), "nearest": nearest, "student": run.student}
    models["packed"] = run.freeze()
    with torch.no_grad():
        wanted = {name: float(closeness(model.eval())) for name, model in models.items()}
    assert {name: line[name] for name in wanted} == pytest.approx(wanted, abs=1e-3)
    assert len({round(value, 2) for value in wanted.values()}) == 4


def test_a_score_costs_no_cpu_seconds(words, capsys, monkeypatch):
    """Also that of a classifier, whose run measures nothing itself."""
    now = [0.0]

    def score(model):
        now[0] += 1000
        return now[0]

    monkeypatch.setattr(time, "process_time", lambda: now[0])
    monkeypatch.setattr(bench_methods, "load_score", lambda name: score)
    words[: len(FLAGS) + 1] = [tiny.MODEL, *tiny.FLAGS]
    words += ["--score", "a.py:mean_ap", "--methods", "squant"]
    (case,) = bench_methods._cases(bench_methods._flags(words))
    assert bench_methods.main([*words, "--one", json.dumps(case)]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["model"], line["measure"]) == (tiny.MODEL, "mean_ap")
    figures = [line[name] for name in ("float", "nearest", "student", "packed")]
    assert figures == [1000, 2000, 3000, 4000]
    assert line["cpu_seconds"] == 0


def test_another_score_of_the_same_model_is_another_case(words):
    cases = [
        bench_methods._cases(bench_methods._flags([*words, "--score", f"a.py:{name}"]))[0]
        for name in ("ap50", "ap75")
    ]
    assert len({tuple(case[key] for key in bench_methods.KEYS) for case in cases}) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "one of the arguments --eval --score is required"),
        (["--eval", "e.npz", "--score", SCORE], "not allowed with argument"),
        (["--eval", "e.npz", "--measure", "AP50"], "leave it out with --eval"),
    ],
)
def test_exactly_one_of_eval_and_score_is_taken(words, more, message, capsys):
    with pytest.raises(SystemExit):
        bench_methods.main([*words, *more])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("none.py:ap50", r"--score none.py:ap50 cannot be loaded: there is no file none.py"),
        (f"{__file__}:ap50", "there is no function ap50 in"),
        ("ap50", "--score ap50 cannot be loaded"),
    ],
)
def test_a_score_that_is_not_there_is_refused(score, message):
    with pytest.raises(InputError, match=message):
        bench_methods.load_score(score)

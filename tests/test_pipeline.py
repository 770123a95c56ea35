"""The whole way with a tiny method: what a run returns and writes, and when it writes nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import dfq
from dfq.evaluate import evaluate
from dfq.methods import METHODS
from dfq.pipeline import Request, Source, execute, quantize
from dfq.types import InputError
from tests.tiny import DATA, MODEL, network, save_images, without_batch_norm
from tests.tiny_method import TINY, TinyConfig


@pytest.fixture(autouse=True)
def _tiny_method(monkeypatch):
    monkeypatch.setitem(METHODS, "tiny", TINY)


def _quantize(**options):
    return quantize(network(), DATA, **{"bits": "w3a3", "method": "tiny", **options})


def _same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_function_of_the_package_is_the_pipelines():
    assert dfq.quantize is quantize


def test_a_run_writes_all_of_its_files(tmp_path):
    out = tmp_path / "deep" / "run"
    run = _quantize(out=out, eval_file=save_images(tmp_path / "e.npz"))
    assert {p.name for p in out.iterdir()} == {
        "result.json",
        "metrics.jsonl",
        "images.npz",
        "model.safetensors",
        "packed.safetensors",
    }
    stored = np.load(out / "images.npz")
    np.testing.assert_array_equal(stored["images"], run.images.images)
    np.testing.assert_array_equal(stored["labels"], run.images.labels)
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [10, 12]
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(run.results))


def test_results_say_everything_about_the_run(tmp_path):
    results = _quantize(eval_file=save_images(tmp_path / "e.npz"), seed=3, effort="quick").results
    assert results["config"] == {
        "steps": 3,
        "lr": 0.01,
        "batch_size": 16,
        "widths": (8, 6),
        "explode": False,
    }
    assert (results["bits"], results["method"], results["protocol"]) == ("w3a3", "tiny", "brecq")
    assert (results["seed"], results["effort"], results["scales"]) == (3, "quick", "learned")
    assert results["data"] == {"shape": (1, 8, 8), "classes": 4, "mean": (0.5,), "std": (0.25,)}
    assert results["versions"]["torch"] == torch.__version__
    assert results["versions"]["threads"] == torch.get_num_threads()
    assert len(results["teacher_sha256"]) == 64
    assert results["seconds"].keys() == {"prepare", "method", "evaluate", "total"}
    assert results["seconds_in_method"].keys() == {"fit"}
    bits = {row["name"]: (row["weight_bits"], row["input_bits"]) for row in results["layers"]}
    assert bits == {"0": (8, 8), "3": (3, 8), "8": (8, 8)}


def test_accuracies_are_those_of_the_three_models(tmp_path):
    path = save_images(tmp_path / "e.npz", 200)
    run = _quantize(eval_file=path, bits="w2a2")
    teacher, student = evaluate(network(), path, DATA), evaluate(run.student, path, DATA)
    assert run.results["float_top1"] == teacher.top1
    assert run.results["student_top1"] == student.top1
    assert run.results["agreement"] == student.agreement(teacher) < 100
    assert run.results["evaluation"]["student"]["agreement"] == run.results["agreement"]
    assert run.results["evaluation"]["float"]["agreement"] == 100
    assert run.results["evaluation"]["images"] == 200


def test_nearest_has_the_same_bits_and_images_but_learned_nothing(tmp_path, monkeypatch):
    """A method that only calibrates ends where nearest starts."""
    path = save_images(tmp_path / "e.npz", 200)
    results = _quantize(eval_file=path, config=TinyConfig(lr=0.0), bits="w2a2").results
    assert results["nearest_top1"] == results["student_top1"]
    assert results["evaluation"]["nearest"]["agreement"] == results["agreement"]


def test_without_an_evaluation_file_accuracies_are_null():
    results = _quantize().results
    for name in ("float_top1", "nearest_top1", "student_top1", "agreement", "evaluation"):
        assert results[name] is None


def test_same_seed_same_student_whatever_the_global_seed(tmp_path):
    torch.manual_seed(1)
    first = _quantize(out=tmp_path / "a")
    torch.manual_seed(2)
    second = _quantize(out=tmp_path / "b")
    assert _same(first.student, second.student)
    for name in ("model.safetensors", "images.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_threads_are_those_asked_for_while_it_runs_and_no_longer(monkeypatch):
    seen = []

    def learn(*args, **options):
        seen.append((torch.get_num_threads(), torch.backends.cudnn.deterministic))
        return TINY.run(*args, **options)

    monkeypatch.setitem(METHODS, "tiny", TINY._replace(run=learn))
    before = torch.get_num_threads(), torch.backends.cudnn.deterministic
    assert _quantize(threads=3).results["versions"]["threads"] == 3
    assert seen == [(3, True)]
    assert (torch.get_num_threads(), torch.backends.cudnn.deterministic) == before


def test_another_seed_another_student():
    assert not _same(_quantize(seed=0).student, _quantize(seed=1).student)


def test_evaluation_changes_no_bit_of_the_student(tmp_path):
    path = save_images(tmp_path / "e.npz")
    assert _same(_quantize().student, _quantize(eval_file=path).student)


def test_the_evaluation_file_is_read_after_the_student_is_finished(tmp_path, monkeypatch):
    path = save_images(tmp_path / "e.npz")
    finished = []

    def learn(teacher, student, data, config, *, rng, report):
        path.rename(tmp_path / "hidden.npz")  # were it opened now, the run would fail
        result = TINY.run(teacher, student, data, config, rng=rng, report=report)
        (tmp_path / "hidden.npz").rename(path)
        finished.append(True)
        return result

    monkeypatch.setitem(METHODS, "tiny", TINY._replace(run=learn))
    assert _quantize(eval_file=path).results["evaluation"]["images"] == 40
    assert finished


def test_the_callers_model_and_random_state_stay_as_they_were():
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    quantize(model, DATA, "w3a3", "tiny")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_callback_hears_every_step():
    heard = []
    _quantize(report=lambda stage, step, steps, **values: heard.append((stage, step, steps)))
    assert heard == [("fit", step, 12) for step in range(1, 13)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": "w9a9"}, "w9a9"),
        ({"bits": "4"}, "w4a4"),
        ({"method": "magic"}, "no method 'magic'"),
        ({"effort": "heroic"}, "no effort 'heroic'"),
        ({"config": 3}, "config is int but tiny takes TinyConfig"),
        ({"protocol": "http"}, "protocol"),
        ({"edge_bits": 9}, "edge_bits"),
        ({"scales": "golden"}, "scales"),
        ({"seed": -1}, "seed"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"device": "meta"}, "cpu and cuda"),
        ({"device": "cuda:99"}, "cuda:99 is not here"),
        ({"eval_file": "none.npz"}, "no evaluation file"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(tmp_path, options, words):
    with pytest.raises(InputError, match=words) as caught:
        _quantize(out=tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_wrong_model_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(InputError, match="no BatchNorm"):
        quantize(without_batch_norm(), DATA, method="tiny", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_weights_are_hashed_as_sha256sum_does(tmp_path):
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"abc")
    request = Request(method="tiny", source=Source(MODEL, weights))
    results = execute(network(), DATA, request).results
    assert results["weights_sha256"].startswith("ba7816bf8f01cfea")  # FIPS 180-2, "abc"
    assert results["model"] == MODEL


@pytest.mark.parametrize("method", ["dmkd", "gdfq"])
def test_real_methods_give_the_same_bits_for_the_same_seed(tmp_path, method):
    path = save_images(tmp_path / "e.npz")
    config = METHODS[method].efforts["quick"]
    config = replace(
        config,
        generator=replace(config.generator, batch_size=8, steps_per_batch=2, first_steps=2),
        schedule=replace(
            config.schedule, batches=3, warmup_batches=2, steps_per_batch=3, batch_size=4, shift=1
        ),
    )
    runs = []
    for seed, options in ((0, {}), (0, {"eval_file": path}), (1, {})):
        torch.manual_seed(len(runs))  # must not matter
        runs.append(_quantize(method=method, config=config, seed=seed, **options))
    assert _same(runs[0].student, runs[1].student)
    assert torch.equal(runs[0].images.images, runs[1].images.images)
    assert not _same(runs[0].student, runs[2].student)

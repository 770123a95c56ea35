"""The demo: what it shows must be true, and its training digits must be gone."""

import numpy as np
import pytest
import torch

from dfq import demo


@pytest.fixture(scope="module")
def results():
    return demo.demo()


def test_rounding_visibly_fails_and_learning_repairs_it(results):
    assert results["float_top1"] > 97
    assert results["nearest_top1"] < 70
    assert results["student_top1"] > results["float_top1"] - 3
    assert results["agreement"] > 95
    assert results["bits"] == "w2a2"


def test_the_sentence_has_the_tables_numbers(results):
    sentence = demo.summary(results)
    assert f"{results['float_top1'] - results['nearest_top1']:.1f} points" in sentence
    assert sentence.count(". ") == 0


def test_held_out_digits_are_the_540_that_were_not_trained_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "_fit", lambda model, images, *rest: seen.append(images))
    demo.train(tmp_path / "e.npz", seed=5)
    stored = np.load(tmp_path / "e.npz")
    assert stored["x"].shape == (540, 8, 8, 1)
    trained = (seen[0] * demo.DATA.std[0] + demo.DATA.mean[0]) * 255
    rows = [*trained.round().reshape(-1, 64).tolist(), *stored["x"].reshape(-1, 64).tolist()]
    everything = np.round(demo.load_digits().data * (255 / 16)).tolist()
    assert sorted(rows) == sorted(everything)


def test_training_depends_on_its_seed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 1)
    weights = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(global_seed)
        weights.append(demo.train(tmp_path / "e.npz", seed).linear.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])

"""Accuracy against numbers that were computed by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from dfq.evaluate import evaluate, wilson
from dfq.types import DataSpec, InputError
from tests.tiny import DATA, network, save_images


class _Reads(nn.Module):
    """Answers with the class that is written in the first pixel, shifted."""

    def __init__(self, shift=0):
        super().__init__()
        self.shift = shift
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        pixel = (x[:, 0, 0, 0] * 0.25 + 0.5) * 255  # undo the normalization of DATA
        return nn.functional.one_hot((pixel.round().long() + self.shift) % 4, 4).float()


def _file(path, right):
    """40 images whose first pixel is the label, but for the last ``40 - right``."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 40)
    pixels = rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.where(np.arange(40) < right, labels, (labels + 1) % 4)
    return save_images(path, x=pixels, y=labels)


@pytest.mark.parametrize("right", [0, 29, 40])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_top1_counts_right_answers(tmp_path, right, batch_size):
    path = _file(tmp_path / "e.npz", right)
    accuracy = evaluate(_Reads(), path, DATA, batch_size=batch_size)
    assert accuracy.count == 40
    assert accuracy.top1 == 100 * right / 40
    assert accuracy.low <= accuracy.top1 <= accuracy.high


def test_images_are_normalized_with_mean_and_std(tmp_path):
    path = save_images(tmp_path / "e.npz", 3)
    model = _Reads()
    evaluate(model, path, DATA)
    pixels = torch.from_numpy(np.load(path)["x"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(model.seen[0], (pixels / 255 - 0.5) / 0.25)
    assert model.seen[0].is_contiguous() or model.seen[0].shape[1] == 1


def test_without_mean_and_std_images_lie_in_0_to_1(tmp_path):
    path = save_images(tmp_path / "e.npz", x=np.full((40, 8, 8, 1), 255, np.uint8))
    model = _Reads()
    evaluate(model, path, DataSpec((1, 8, 8), 4))
    torch.testing.assert_close(model.seen[0], torch.ones(40, 1, 8, 8), rtol=0, atol=0)


def test_agreement_is_image_by_image(tmp_path):
    path = _file(tmp_path / "e.npz", 30)
    first, second = evaluate(_Reads(), path, DATA), evaluate(_Reads(1), path, DATA)
    assert first.agreement(first) == 100
    assert first.agreement(second) == 0
    assert first.agreement(evaluate(_Reads(), _file(tmp_path / "f.npz", 20), DATA)) == 75


def test_agreement_needs_the_same_images(tmp_path):
    few = evaluate(_Reads(), save_images(tmp_path / "e.npz", 5), DATA)
    many = evaluate(_Reads(), save_images(tmp_path / "f.npz", 6), DATA)
    with pytest.raises(ValueError, match="same images"):
        few.agreement(many)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (81, 263, 25.53, 36.62)],
)
def test_wilson_interval_against_published_figures(right, count, low, high):
    """The last is table I, method 3, of Newcombe, Statistics in Medicine 17 (1998)."""
    assert wilson(right, count) == pytest.approx((low, high), abs=0.01)


def test_evaluation_leaves_the_model_as_it_was(tmp_path):
    path = save_images(tmp_path / "e.npz")
    model = network().train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(model, path, DATA)
    assert model.training
    assert not model[1].training
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_evaluation_draws_no_random_numbers(tmp_path):
    path = save_images(tmp_path / "e.npz")
    model = network()
    before = torch.get_rng_state()
    evaluate(model, path, DATA)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(InputError, match="must lie in"):
        evaluate(network(), save_images(tmp_path / "e.npz", y=np.arange(40)), DATA)

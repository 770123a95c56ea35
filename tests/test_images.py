"""Files of synthetic images: whole, checked, and the same pixels in another normalization."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dfq.pipeline.images import read_images, write_images
from dfq.types import DataSpec, Images, InputError

DATA = DataSpec((2, 4, 3), 5, mean=(0.5, 0.25), std=(0.25, 0.5))


def _images(count=6):
    rng = torch.Generator().manual_seed(0)
    return Images(torch.randn(count, 2, 4, 3, generator=rng), torch.arange(count) % 5)


def _write(path, **changes):
    images, labels = (tensor.numpy() for tensor in _images())
    arrays = {"images": images, "labels": labels, "mean": DATA.mean, "std": DATA.std}
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_images_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "i.npz"
    write_images(path, _images(), DATA)
    for before, after in zip(_images(), read_images(path, DATA), strict=True):
        assert torch.equal(before, after)
        assert before.dtype == after.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["i.npz"]


@pytest.mark.parametrize("other", [((0.1, 0.9), (0.5, 0.1)), ((), ())])
def test_another_normalization_has_the_same_pixels(tmp_path, other):
    path = tmp_path / "i.npz"
    write_images(path, _images(), DATA)
    read = read_images(path, replace(DATA, mean=other[0], std=other[1]))
    mean, std = (
        torch.tensor(v or d)[:, None, None] for v, d in zip(other, ((0, 0), (1, 1)), strict=True)
    )
    own_mean, own_std = (torch.tensor(v)[:, None, None] for v in (DATA.mean, DATA.std))
    expected = _images().images * own_std + own_mean
    torch.testing.assert_close(read.images * std + mean, expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": None}, "lacks 'images"),
        ({"mean": None}, "lacks 'mean"),
        ({"images": np.zeros((6, 4, 3, 2), np.float32)}, r"\[6, 4, 3, 2\].*\[N, 2, 4, 3\]"),
        ({"images": np.zeros((6, 2, 4, 3), np.uint8)}, "uint8"),
        ({"images": np.full((6, 2, 4, 3), np.nan, np.float32)}, "not finite"),
        ({"images": np.zeros((0, 2, 4, 3), np.float32), "labels": np.zeros(0, np.int64)}, "no ima"),
        ({"labels": np.full(6, 5)}, r"0\.\.4"),
        ({"labels": np.zeros(5, np.int64)}, r"int64 \[6\]"),
        ({"std": (0.0, 1.0)}, "std must be positive"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_sentence(tmp_path, changes, words):
    path = _write(tmp_path / "i.npz", **changes)
    with pytest.raises(InputError, match=words) as caught:
        read_images(path, DATA)
    assert "\n" not in str(caught.value)


def test_a_missing_or_damaged_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no image file"):
        read_images(tmp_path / "none.npz", DATA)
    path = _write(tmp_path / "i.npz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match="corrupt"):
        read_images(path, DATA)
    np.savez(path, images=np.array([{}], object), labels=np.zeros(1))
    with pytest.raises(InputError, match="corrupt"):  # pickled objects are not read
        read_images(path, DATA)

"""Data mixing: a box of one image in another, and labels that say how much of each there is.

MixMix (arXiv:2011.09899). That images and labels are mixed is the paper's; the box and its shape
are CutMix's (arXiv:1905.04899), the rest is our reconstruction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dfq.types import InputError


class Mixed(NamedTuple):
    """Images with a box of another one in them.

    Attributes:
        images: [B, C, H, W]; gradients reach both images of a pair.
        labels: [B, classes], float; a row says which share of the image is whose.
    """

    images: Tensor
    labels: Tensor


def mix(images: Tensor, labels: Tensor, share: float, rng: torch.Generator) -> Mixed:
    """Paste a box of another image of the batch into each image with probability ``share``.

    Image n becomes ``(1 - mask) * x_n + mask * x_m``, its label ``(1 - area) * y_n + area * y_m``
    with ``area`` the mean of the mask. The box has the proportions of the image, lies anywhere in
    it, and covers 0 to 1 of it, uniformly drawn and rounded to pixels.

    Args:
        images: [B, C, H, W].
        labels: [B, classes], float, rows of which sum to one.
        share: 0 to 1.
        rng: CPU generator.

    Raises:
        InputError: ``share`` is none.
    """
    if not 0 <= share <= 1:
        raise InputError(f"the share of mixed images must be 0 to 1, got {share}.")
    batch, _, height, width = images.shape
    if share == 0 or batch == 1:
        return Mixed(images, labels)
    mask = _boxes(batch, height, width, share, rng).to(images.device)  # [B, 1, H, W]
    by = int(torch.randint(1, batch, (), generator=rng))
    area = mask.float().mean((1, 2, 3))[:, None]  # [B, 1]
    return Mixed(
        torch.where(mask, images.roll(by, 0), images),
        torch.lerp(labels, labels.roll(by, 0), area),
    )


def _boxes(batch: int, height: int, width: int, share: float, rng: torch.Generator) -> Tensor:
    """[batch, 1, height, width], bool: a box in some, nothing in others."""
    chosen, ratio, top, left = torch.rand(4, batch, 1, generator=rng)
    side = torch.where(chosen < share, ratio.sqrt(), 0.0)
    rows, columns = _span(side, top, height), _span(side, left, width)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _span(side: Tensor, start: Tensor, size: int) -> Tensor:
    """[B, 1] shares of ``size`` -> [B, size]: a stretch of that length that begins somewhere."""
    length = (side * size).round()
    first = (start * (size - length + 1)).floor()
    place = torch.arange(size)
    return (place >= first) & (place < first + length)

"""Accuracy on real images: the only place that reads them, and only after the student exists."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import dfq.data as images
from dfq.types import DataSpec

Z = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers, in percent.

    Attributes:
        top1: percent of images whose largest logit is the label's.
        low: lower end of the 95 % confidence interval (Wilson's score interval), in percent.
        high: its upper end.
        count: number of images.
        answers: [N] int64, the class given to each image.
    """

    top1: float
    low: float
    high: float
    count: int
    answers: Tensor = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, float]:
        """``top1``, ``low`` and ``high``."""
        return {"top1": self.top1, "low": self.low, "high": self.high}

    def agreement(self, other: Accuracy) -> float:
        """Percent of images, one by one, on which both models answer the same.

        Raises:
            ValueError: the two were measured on different numbers of images.
        """
        if self.count != other.count:
            raise ValueError(
                f"agreement needs the same images, got {self.count} and {other.count}; "
                "evaluate both models on one file."
            )
        return 100 * int((self.answers == other.answers).sum()) / self.count


def check(path: str | Path, data: DataSpec) -> int:
    """Count the images of an evaluation file and refuse what does not fit ``data``.

    Looks at checksums, headers and labels; meant to run before any other work.

    Raises:
        InputError: the file is missing or corrupt, or its shape, dtype or labels are wrong.
    """
    return images.check(path, data)


def evaluate(
    model: nn.Module, path: str | Path, data: DataSpec, *, batch_size: int = 100
) -> Accuracy:
    """Measure ``model`` on the images of ``path`` (``.npz`` or a folder of class folders).

    Args:
        model: [B, C, H, W] float32 -> [B, classes]; runs in eval mode on its own device.
        path: what :func:`check` accepts.
        data: images are divided by 255 and normalized with its mean and std.
        batch_size: images at a time.

    Raises:
        InputError: as :func:`check`.
    """
    images.check(path, data)
    device = next(chain(model.parameters(), model.buffers())).device  # packed ones have buffers
    mean, std = _column(data.mean, 0.0, data, device), _column(data.std, 1.0, data, device)
    answers, labels = [], []
    with _eval_mode(model), torch.no_grad():
        for batch in images.batches(path, data, batch_size):
            pixels = torch.from_numpy(np.ascontiguousarray(batch.pixels)).to(device)
            x = pixels.permute(0, 3, 1, 2).float() / 255  # [B, C, H, W]
            answers.append(model((x - mean) / std).argmax(1).cpu())
            labels.append(torch.from_numpy(batch.labels))
    answer = torch.cat(answers)
    return _accuracy(answer, int((answer == torch.cat(labels)).sum()))


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927), in percent."""
    share = right / count
    center = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    spread = math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    half = Z * spread / (1 + Z * Z / count)
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)


def _accuracy(answers: Tensor, right: int) -> Accuracy:
    count = len(answers)
    return Accuracy(100 * right / count, *wilson(right, count), count, answers)


def _column(
    values: tuple[float, ...], default: float, data: DataSpec, device: torch.device
) -> Tensor:
    """[C, 1, 1]."""
    filled = values or (default,) * data.shape[0]
    return torch.tensor(filled, device=device).view(-1, 1, 1)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training

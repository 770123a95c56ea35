"""Range finders: what a quantizer learns of a tensor before it quantizes it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from dfq.prepare.grid import range_to_scale, to_grid
from dfq.types import QuantSpec

RATIOS = 100  # clip ratios 1.00, 0.99, ..., 0.01 (GENIE, arXiv:2212.04780, released code)
POWER = 2.4  # exponent of the error (BRECQ, arXiv:2102.05426, released code)
CHUNK = 2**20  # elements in flight while searching
SAMPLE = 2**17  # values of one activation tensor that a search looks at


def minmax(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value, each [C], or [1] if ``axis`` is None."""
    rows = _rows(x.detach(), axis)
    return rows.amin(1), rows.amax(1)


class EmaMinMax(nn.Module):
    """Bias-corrected exponential moving average of minima and maxima.

    The uncorrected average ``a_t = decay * a_{t-1} + (1 - decay) * x_t`` and its weight
    ``w_t = 1 - decay**t`` give the range ``r_t = a_t / w_t``, kept here in the equivalent form
    ``r_t = r_{t-1} + (1 - decay) / w_t * (x_t - r_{t-1})``, which is exactly constant where x is.
    (Feeding ``r_{t-1}`` back as ``a_{t-1}``, as the code of ZeroQ and GDFQ does, overshoots
    thousandfold.)

    ``decay`` defaults to GDFQ's (arXiv:2003.03603, released code).
    """

    low: Tensor
    high: Tensor
    weight: Tensor

    def __init__(self, channels: int = 1, *, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("low", torch.zeros(channels))
        self.register_buffer("high", torch.zeros(channels))
        self.register_buffer("weight", torch.zeros(()))

    @torch.no_grad()
    def update(self, low: Tensor, high: Tensor) -> None:
        """Take in the range [C], [C] of one more tensor."""
        self.weight.mul_(self.decay).add_(1.0 - self.decay)
        share = (1.0 - self.decay) / self.weight
        self.low.add_(share * (low.float() - self.low))
        self.high.add_(share * (high.float() - self.high))

    def reset(self) -> None:
        """Forget everything."""
        for buffer in self.buffers():
            buffer.zero_()


class Sample:
    """Range and a bounded random sample of all values of tensors that arrive one by one.

    Args:
        per_tensor: how many values to keep of each tensor.
        rng: CPU generator; the same one gives the same sample on every device.
    """

    def __init__(self, per_tensor: int, rng: torch.Generator) -> None:
        self.per_tensor, self.rng = per_tensor, rng
        self.parts: list[Tensor] = []
        self.ranges: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor) -> None:
        """Take in one more tensor of any shape."""
        x = x.detach()
        self.ranges.append(minmax(x, None))
        if x.numel() > self.per_tensor:
            picks = torch.randint(x.numel(), (self.per_tensor,), generator=self.rng)
            x = x.flatten()[picks.to(x.device)]
        self.parts.append(x.flatten().float().clone())

    def span(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest of all values, each [1]."""
        lows, highs = zip(*self.ranges, strict=True)
        return torch.cat(lows).amin().reshape(1), torch.cat(highs).amax().reshape(1)

    def search(self, spec: QuantSpec) -> tuple[Tensor, Tensor]:
        """``search_scale`` over the sample, within the range of all values."""
        return search_scale(torch.cat(self.parts), spec, span=self.span())


@torch.no_grad()
def search_scale(
    x: Tensor, spec: QuantSpec, *, span: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The grid with the smallest ``sum |x - to_grid(x)|**2.4`` among 100 clip ratios of the range.

    Args:
        x: any shape; every channel along ``spec.axis`` is searched for itself.
        spec: the grid.
        span: (low, high), each [C], to clip ratios of; None takes those of ``x``.

    Returns:
        scale [C] and zero_point [C], float32 ([1] if ``spec.axis`` is None). Of equal errors the
        widest range wins.
    """
    rows = _rows(x, spec.axis)  # [C, N]
    spec = dataclasses.replace(spec, axis=0)
    low, high = minmax(rows, 0) if span is None else span
    size = torch.maximum(low.abs(), high.abs()).float().clamp(min=torch.finfo(torch.float32).tiny)
    best_scale, best_zero_point = range_to_scale(low, high, spec)
    best = torch.full_like(size, torch.inf, dtype=torch.float64)
    for percent in range(RATIOS, 0, -1):
        ratio = percent / RATIOS
        scale, zero_point = range_to_scale(low * ratio, high * ratio, spec)
        error = _error(rows, scale, zero_point, spec, size)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


def _error(
    rows: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, size: Tensor
) -> Tensor:
    """[C, N] -> [C]: sum over N of ``(|x - to_grid(x)| / size)**POWER``, CHUNK elements at a time.

    Dividing by ``size`` keeps the power of very small and very large errors finite.
    """
    total = torch.zeros_like(size, dtype=torch.float64)
    for part in rows.split(max(1, CHUNK // rows.shape[0]), dim=1):
        gap = (part - to_grid(part, scale, zero_point, spec)).float()
        total += gap.abs_().div_(size[:, None]).pow_(POWER).sum(1, dtype=torch.float64)
    return total


def _rows(x: Tensor, axis: int | None) -> Tensor:
    """Any shape -> [C, N] with the channels of ``axis`` first; [1, N] if it is None."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)

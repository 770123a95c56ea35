"""The arithmetic of a ``QuantSpec``: a range to its scale, a tensor to its grid and codes."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq.types import QuantSpec
from dfq_kernels import fake_quantize

# An empty range still needs a positive scale whose inverse is finite; no trained tensor has a grid
# this fine, and a midrise grid, which has no zero, puts zeros at +-2**-121.
SMALLEST_SCALE = 2.0**-120


def range_to_scale(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The finest grid of ``spec`` that covers ``[low, high]`` and zero.

    Asymmetric: ``scale = (high - low) / (quant_max - quant_min)``, and ``zero_point`` is a code,
    so that zero is on the grid. Symmetric: the larger of ``high / quant_max`` and
    ``low / quant_min``; an unsigned grid ignores ``low``.

    Args:
        low: [C], smallest values.
        high: [C], largest values.
        spec: the grid.

    Returns:
        scale [C], float32, positive; zero_point [C], float32 holding integers.
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    if spec.symmetric:
        half = 0.5 if spec.midrise else 0.0
        scale = high / (spec.quant_max + half)
        if spec.signed:
            scale = torch.maximum(scale, low / (spec.quant_min + half))
        return scale.clamp(min=SMALLEST_SCALE), torch.zeros_like(scale)
    steps = spec.quant_max - spec.quant_min
    scale = (high / steps - low / steps).clamp(min=SMALLEST_SCALE)  # high - low could overflow
    zero_point = spec.quant_min - torch.round(low / scale)
    return scale, zero_point.clamp(spec.quant_min, spec.quant_max)


def to_grid(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    spec: QuantSpec,
    *,
    drop: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The value of the grid nearest to each ``x``; same shape and dtype, LSQ gradients.

    Args:
        x: any shape; channels along ``spec.axis``.
        scale: [1] or [C], float32, positive.
        zero_point: same shape, float32 holding integers.
        spec: the grid.
        drop: with this probability an element stays as it is (``dfq_kernels.fake_quantize``).
        seed: [], int64, which elements.
    """
    bounds = (spec.quant_min, spec.quant_max, spec.axis, drop, seed)
    if spec.midrise:
        half = 0.5 * align(scale, x, spec)  # levels (code + 1/2) * scale: shift there and back
        return (fake_quantize(x - half, scale, zero_point, *bounds) + half).to(x.dtype)
    return fake_quantize(x, scale, zero_point, *bounds)


def to_codes(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """The codes whose values ``to_grid`` gives: int8, or uint8 where the grid is unsigned.

    Read off the output of ``to_grid``, so that both round alike on every backend.
    """
    half = 0.5 if spec.midrise else 0.0
    values = to_grid(x.float(), scale, zero_point, spec)
    codes = torch.round(values / align(scale, x, spec) - half) + align(zero_point, x, spec)
    return codes.to(torch.int8 if spec.signed else torch.uint8)


def align(parameter: Tensor, x: Tensor, spec: QuantSpec) -> Tensor:
    """[C] -> [1, C, 1, ...] so that it broadcasts along ``spec.axis`` of ``x``."""
    if spec.axis is None:
        return parameter
    shape = [1] * x.ndim
    shape[spec.axis] = -1
    return parameter.reshape(shape)

"""From sums to outputs: dfq_kernels/integer.py in Triton, each operation rounded once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels._triton import arithmetic, integer_nibbles
from dfq_kernels._triton.arithmetic import ROUNDING_SHIFT

Epilogue = tuple[tuple[Any, ...], dict[str, Any]]  # values and constants of ``finish``


def epilogue_arguments(y: Tensor, rest: tuple[Any, ...]) -> Epilogue:
    """From the last arguments of an op, multiplier to grid."""
    multiplier, bias, residual, residual_multiplier, residual_zero, relu, grid = rest
    zero, low, high = grid[:3] or (0, 0, 0)
    least = max(low - zero, 0) if relu else low - zero  # ReLU is a bound among others
    bounds = (float(least), float(high - zero), zero)
    values = (y, multiplier, bias, residual, float(residual_multiplier), float(residual_zero))
    kind = "packed" if len(grid) > 3 else "int8" if grid else "relu" if relu else "float"
    return (*values, *bounds), {"STORED": kind}


def empty_images(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """To be filled; in channels_last memory."""
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


@triton.jit
def finish(
    sums, pixel, known_pixel, channel, known_channel, border, border_row, outputs, epilogue,
    STORED: tl.constexpr,
):  # fmt: skip
    """Store the outputs of ``sums`` [pixels, channels]; ``pixel`` is int64.

    To the sums ``border`` is added, [rows, outputs] or None: its row ``border_row`` of each pixel,
    or if that is None the first.
    """
    y, multiplier, bias, residual, residual_multiplier, residual_zero, low, high, zero = epilogue
    mask = known_pixel[:, None] & known_channel[None, :]
    if border is not None:
        if border_row is None:
            sums += tl.load(border + channel, mask=known_channel, other=0)[None, :]
        else:
            place = border_row[:, None] * outputs + channel[None, :]
            sums += tl.load(border + place, mask=mask, other=0)
    f = sums.to(tl.float32) * tl.load(multiplier + channel, mask=known_channel, other=0.0)[None, :]
    if bias is not None:
        f = f + tl.load(bias + channel, mask=known_channel, other=0.0)[None, :]
    elif STORED == "float" or STORED == "relu":
        f = f + 0.0  # -0 becomes 0
    if residual is not None:
        if residual.dtype.element_ty == tl.uint8:
            place, inside = _bytes(pixel, known_pixel, channel, outputs)
            packed = tl.load(residual + place, mask=inside, other=0)
            added = integer_nibbles.whole(packed, False) >> 4
        else:
            place = pixel[:, None] * outputs + channel[None, :]
            added = tl.load(residual + place, mask=mask, other=0)
        f = f + (added.to(tl.float32) - residual_zero) * residual_multiplier
    if STORED == "int8" or STORED == "packed":
        # the lowest byte of the rounded float holds the code
        rounded = arithmetic.clamp(f, low, high) + ROUNDING_SHIFT
        stored = (rounded.to(tl.int32, bitcast=True) + zero).to(tl.int8)
    elif STORED == "relu":
        stored = tl.where(f > 0, f, 0.0)
    else:
        stored = f
    if STORED == "packed":
        place, inside = _bytes(pixel, known_pixel, channel, outputs)
        tl.store(y + place, integer_nibbles.packed(stored), mask=inside)
    else:
        tl.store(y + pixel[:, None] * outputs + channel[None, :], stored, mask=mask)


@triton.jit
def _bytes(pixel, known_pixel, channel, outputs):
    """Where the packed channels lie; they are a multiple of 64 and begin at one."""
    byte = tl.min(channel, 0) // 2 + tl.arange(0, channel.shape[0] // 2)
    place = pixel[:, None] * (outputs // 2) + byte[None, :]
    return place, known_pixel[:, None] & (byte < outputs // 2)[None, :]

"""From sums to outputs: dfq_kernels/integer.py in Triton, each operation rounded once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels._triton import arithmetic, integer_nibbles

Epilogue = tuple[tuple[Any, ...], dict[str, Any]]  # values and constants of ``finish``


def epilogue_arguments(y: Tensor, rest: tuple[Any, ...]) -> Epilogue:
    """From the last arguments of an op, multiplier to grid."""
    multiplier, bias, residual, residual_multiplier, residual_zero, relu, grid = rest
    multiplier, bias = neighbors(multiplier), neighbors(bias)
    zero, low, high = grid[:3] or (0, 0, 0)
    least = max(low - zero, 0) if relu else low - zero  # ReLU is a bound among others
    bounds = (float(least), float(high - zero), zero)
    values = (y, multiplier, bias, residual, float(residual_multiplier), float(residual_zero))
    kind = "packed" if len(grid) > 3 else "int8" if grid else "relu" if relu else "float"
    return (*values, *bounds), {"STORED": kind}


def neighbors(values: Tensor | None) -> Tensor | None:
    """A value for each channel, [O] or None, without gaps in memory."""
    return None if values is None else values.contiguous()


def empty_images(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """To be filled; in channels_last memory."""
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


@triton.jit
def channel_terms(channel, known_channel, multiplier, bias):
    """Multiplier and bias of each channel."""
    shift = tl.zeros((channel.shape[0],), tl.float32)  # without a bias too: -0 becomes 0
    if bias is not None:
        shift = tl.load(bias + channel, mask=known_channel, other=0.0)
    return tl.load(multiplier + channel, mask=known_channel, other=0.0), shift


@triton.jit
def finish(
    sums, pixel, known_pixel, channel, known_channel, border, border_row, outputs, epilogue,
    STORED: tl.constexpr, terms=None,
):  # fmt: skip
    """Store the outputs of ``sums`` [pixels, channels]; ``pixel`` is int64.

    ``terms`` are the ``channel_terms``, if the caller has them for several calls.
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
    if terms is None:
        terms = channel_terms(channel, known_channel, multiplier, bias)
    f = sums.to(tl.float32) * terms[0][None, :] + terms[1][None, :]
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
        stored = arithmetic.stored(f, low, high, zero)
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

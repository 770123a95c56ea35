"""requantize in Triton: bytes in, bytes out, sixteen at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels._triton.arithmetic import stored
from dfq_kernels._triton.launch import launch

VECTOR = 16  # bytes that a thread loads at once
BLOCK = 8192  # bytes of a program: four vectors for each thread


def requantize(
    codes: Tensor, scale: float, new_scale: float, zero: int, new_zero: int, low: int, high: int
) -> Tensor:
    """See dfq_kernels.requantize."""
    y = torch.empty_like(codes)  # dense, and codes lie as it does
    count = codes.numel()
    if count:
        programs = triton.cdiv(max(count // VECTOR, 1) * VECTOR, BLOCK)
        grid = float(low - new_zero), float(high - new_zero), new_zero
        args = codes, y, (scale, new_scale, float(zero)), grid, count // VECTOR, count % VECTOR
        constants = {"VECTOR": VECTOR, "BLOCK": BLOCK, "REST": count % VECTOR != 0}
        launch(kernel, programs, codes, *args, **constants)
    return y


@triton.jit
def kernel(
    codes, y, old, grid, vectors, rest,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program: a block of whole vectors; the last one also the rest."""
    scale, new_scale, zero = old
    step = tl.cast(new_scale, tl.float32)
    inverse = tl.div_rn(1.0 + tl.zeros_like(step), step)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    whole = tl.cast(vectors, tl.int64) * VECTOR
    at = tl.arange(0, BLOCK)
    _rewrite(codes + first, y + first, at, whole - first, scale, inverse, zero, grid)
    if REST:  # a constant  # noqa: SIM102
        if tl.program_id(0) == tl.num_programs(0) - 1:
            last = tl.arange(0, VECTOR)
            _rewrite(codes + whole, y + whole, last, rest, scale, inverse, zero, grid)


@triton.jit
def _rewrite(codes, y, at, count, scale, inverse, zero, grid):
    mask = at < count
    value = (tl.load(codes + at, mask=mask).to(tl.float32) - zero) * scale * inverse
    low, high, new_zero = grid
    tl.store(y + at, stored(value, low, high, new_zero), mask=mask)

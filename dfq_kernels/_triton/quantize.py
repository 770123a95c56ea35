"""quantize in Triton: which kernel, and cut into which tiles."""

from __future__ import annotations

import functools
import math
from typing import Any

import triton
from torch import Tensor

from dfq_kernels._triton import quantize_kernels as kernels
from dfq_kernels._triton.fake_quantize import FORWARD_LOADS, THREADS, VECTOR_BYTES, tiling_of
from dfq_kernels._triton.launch import launch
from dfq_kernels._triton.layout import block, layout_of
from dfq_kernels.quantize import empty_codes

MOST_CHANNELS = 128  # of a tile that is transposed: bytes of a pixel that are stored at once


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, offset: int
) -> Tensor:
    """See dfq_kernels.quantize."""
    y = empty_codes(x)
    if x.numel() == 0:
        return y
    parameters = scale, zero_point, quant_min, quant_max, offset
    if x.ndim == 4 and x.shape[1] > 1 and x.stride(1) != 1:
        programs, walk, constants = _planes(x.shape, x.stride(), x.element_size())
        launch(kernels.planes, programs, x, x, y, parameters, walk, **constants)
        return y
    tiling = tiling_of(layout_of(y, (x,), None), x.element_size(), FORWARD_LOADS, 1)
    constants = {name: n for name, n in tiling.constants.items() if name != "WORDS"}
    launch(kernels.rows, tiling.programs, x, x, y, parameters, tiling.walk, **constants)
    return y


@functools.lru_cache(maxsize=4096)
def _planes(
    shape: tuple[int, ...], strides: tuple[int, ...], element_size: int
) -> tuple[int, tuple[Any, ...], dict[str, int | bool]]:
    """Programs, walk and constants of the kernel; strides come in units of VECTOR elements."""
    batch, channels, height, width = shape
    of_batch, of_channel, *steps = strides
    pixels = height * width
    sizes: tuple[int, ...] = (height, width)
    if height == 1 or steps[0] == width * steps[1]:
        sizes, steps = (pixels,), steps[1:]
    elif width == 1:
        sizes, steps = (pixels,), steps[:1]
    contiguous = steps == [1]
    vector = math.gcd(8, pixels, of_batch, of_channel) if contiguous else 1
    wide = max(pixels, sum(n * step for n, step in zip(sizes, steps, strict=True))) >= 2**31 - 2**16
    elements = THREADS * VECTOR_BYTES // element_size * FORWARD_LOADS
    columns = min(triton.next_power_of_2(channels), block(channels, MOST_CHANNELS))
    rows = min(elements // columns, max(16, triton.next_power_of_2(pixels)))
    unit = math.gcd(16, channels)
    across = triton.cdiv(channels, columns)
    programs = batch * triton.cdiv(pixels, rows) * across
    inputs = of_batch // vector, of_channel // vector, sizes, tuple(steps)
    walk = (*inputs, pixels // vector, channels // unit)
    constants = {
        "CONTIGUOUS": contiguous,
        "WIDE": wide,
        "VECTOR": vector,
        "UNIT": unit,
        "PIXELS": rows,
        "CHANNELS": columns,
    }
    return programs, walk, constants

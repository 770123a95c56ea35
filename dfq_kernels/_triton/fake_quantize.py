"""fake_quantize in Triton: which kernel, and cut into which tiles."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from dfq_kernels._triton import fake_quantize_kernels as kernels
from dfq_kernels._triton.launch import launch
from dfq_kernels._triton.layout import Layout, block, layout_of

VECTOR_BYTES = 16  # that a thread loads at once,
THREADS = 128  # the threads of a program,
FORWARD_LOADS = 4  # and how often before it waits;
BACKWARD_LOADS = 2  # here from each of grad and x
ROW_BYTES = 128  # of a tile that has channels in its columns: high, so that it leaves few sums
MOST_TILES = 8  # of a program: the terms of a gradient that one thread adds up
ENOUGH_PROGRAMS = 2048  # to keep every GPU busy; only beyond it a program takes several tiles
PARTS = 1024  # sums that a program of the second stage takes at a time


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    drop: float,
    seed: Tensor | None,
) -> Tensor:
    """See dfq_kernels.fake_quantize."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    layout = layout_of(y, (x,), axis)
    tiling = tiling_of(layout, x.element_size(), FORWARD_LOADS, MOST_TILES if layout.run else 1)
    kernel = kernels.columns_forward if layout.run else kernels.rows_forward
    parameters = _parameters(scale, zero_point, quant_min, quant_max)
    args = x, y, parameters, _drop(drop, seed), tiling.walk
    launch(kernel, tiling.programs, x, *args, **tiling.constants)
    return y


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    drop: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_scale: bool,
    needs_zero_point: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See dfq_kernels.fake_quantize; an empty tensor for each gradient that is not needed."""
    dx = torch.empty_like(x)
    if x.numel() == 0:
        gradients = dx, torch.zeros_like(scale), -0.0 * scale
    else:
        layout = layout_of(dx, (grad, x), axis)
        tiling = tiling_of(layout, x.element_size(), BACKWARD_LOADS, MOST_TILES)
        kernel = kernels.columns_backward if layout.run else kernels.rows_backward
        sums = [
            scale.new_empty(tiling.parts * scale.numel()) if needed else None
            for needed in (needs_scale, needs_zero_point)
        ]
        parameters = _parameters(scale, zero_point, quant_min, quant_max)
        args = grad, x, dx if needs_x else None, *sums, parameters, _drop(drop, seed), tiling.walk
        launch(kernel, tiling.programs, x, *args, **tiling.constants)
        gradients = dx, *_finish(sums, scale, tiling)
    needs = needs_x, needs_scale, needs_zero_point
    return tuple(t if need else t.new_empty(0) for t, need in zip(gradients, needs, strict=True))


@dataclass(frozen=True)
class Tiling:
    """Tiles, and what the kernels are told about them; a function of layout and dtype alone."""

    programs: int
    parts: int  # sums of each channel that the programs leave behind
    run: int  # neighbours among them that are of one channel
    walk: tuple[Any, ...]
    constants: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def tiling_of(layout: Layout, element_size: int, loads: int, most_tiles: int) -> Tiling:
    """Cut ``layout``; a program takes up to ``most_tiles`` tiles of the same channels."""
    rows, columns, run = layout.rows, layout.columns, layout.run
    elements = THREADS * VECTOR_BYTES // element_size * loads
    width = block(columns.count, ROW_BYTES // element_size if run else elements)
    height = min(elements // width, triton.next_power_of_2(rows.count))
    down, across = triton.cdiv(rows.count, height), triton.cdiv(columns.count, width)
    line, lines = (down, across) if run else (across, down)
    tiles = max(1, min(most_tiles, line, down * across // ENOUGH_PROGRAMS))
    splits = triton.cdiv(line, tiles)
    vector = layout.vector
    row_strides = tuple(tuple(step // vector for step in steps) for steps in rows.strides)
    sides = rows.count, rows.sizes, row_strides, columns.count // vector, columns.sizes
    constants = {
        "CONTIGUOUS": layout.contiguous,
        "WIDE": columns.extent >= 2**31 - 2**16,
        "VECTOR": vector,
        "WORDS": _words(rows.count, columns.count, vector, VECTOR_BYTES // element_size),
        "ROWS": height,
        "COLUMNS": width,
    }
    if run:
        constants["RUN"] = run
    else:
        constants |= {"FLAT": rows.count == 1, "REST": columns.count % vector != 0}
    parts = splits * (columns.count if run else rows.count) // layout.channels
    walk = *sides, columns.strides, tiles, splits
    return Tiling(splits * lines, parts, max(run, 1), walk, constants)


def _words(rows: int, length: int, vector: int, in_16_bytes: int) -> int:
    if rows > 1 and length % 4 != 0:
        return 1
    return in_16_bytes if rows == 1 or vector % in_16_bytes == 0 else 4


def _parameters(
    scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> tuple[Any, ...]:
    grid = scale, scale.stride(0), zero_point, zero_point.stride(0)
    return *grid, scale.numel(), quant_min, quant_max


def _drop(drop: float, seed: Tensor | None) -> tuple[Tensor, int] | None:
    """The upper 24 bits of a word are below the threshold if the word is not above the second."""
    threshold = int(drop * 2**24 + 0.5)
    return (seed, 2**8 * threshold - 1) if threshold and seed is not None else None


def finish_constants(channels: int) -> dict[str, int]:
    """What a program of the second stage takes at a time."""
    width = min(32, triton.next_power_of_2(channels))
    return {"PARTS": PARTS // width, "CHANNELS": width}


def _finish(sums: list[Tensor | None], scale: Tensor, tiling: Tiling) -> tuple[Tensor, Tensor]:
    """The second stage: the gradients of scale and zero_point, where there are sums of them."""
    dscale, dzero_point = (scale.new_empty(scale.shape) for _ in sums)
    if sums != [None, None]:
        channels = scale.numel()
        targets = (
            t if part is not None else None
            for t, part in zip((dscale, dzero_point), sums, strict=True)
        )
        args = *sums, scale, scale.stride(0), *targets, tiling.parts // tiling.run, channels
        constants = finish_constants(channels)
        programs = triton.cdiv(channels, constants["CHANNELS"])
        launch(kernels.finish_backward, programs, scale, *args, RUN=tiling.run, **constants)
    return dscale, dzero_point

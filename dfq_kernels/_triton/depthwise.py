"""Depthwise qconv2d in Triton: which kernel, and cut into which blocks."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from dfq_kernels._triton import depthwise_kernels as kernels
from dfq_kernels._triton.integer_epilogue import empty_images, epilogue_arguments, neighbors
from dfq_kernels._triton.launch import launch
from dfq_kernels._triton.layout import block
from dfq_kernels.packing import packed_size
from dfq_kernels.qconv2d import Window

THREADS = 128
MOST_CHANNELS = 128  # of a tile
MOST_TAPS = 49  # of a filter that is held in registers
REGISTERS = 130  # for filters, sums and what is loaded
ENOUGH_PROGRAMS = 2048  # to keep every GPU busy; only beyond it a program takes several tiles
MOST_TILES = 8


def depthwise(
    x: Tensor,
    weight: Tensor,
    weight_zero: Tensor | None,
    prepacked: Tensor | None,
    x_zero: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    multiplier: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_multiplier: float,
    residual_zero: int,
    relu: bool,
    grid: Sequence[int],
) -> Tensor:
    """qconv2d with a group for each channel of x; see dfq_kernels.qconv2d."""
    kernel, steps, pads, gaps = (tuple(p) for p in (kernel_size, stride, padding, dilation))
    window = Window(steps, pads, gaps, groups)
    size = window.output_size((x.shape[2], x.shape[3]), kernel)
    channels, taps = multiplier.shape[0], math.prod(kernel)
    dtype = torch.int8 if grid else torch.float32
    y = empty_images(x, (x.shape[0], channels, *size), dtype)
    if y.numel() == 0:
        return y
    cut = _cut(size, kernel, steps, gaps, (x.shape[0], channels))
    unit = math.gcd(16, groups) if channels == groups else 1
    constants = {
        "KERNEL": kernel,
        "STRIDE": steps,
        "DILATION": gaps,
        "MULTIPLE": channels // groups,
        "ROW": packed_size(taps) if weight.dtype == torch.uint8 else taps,
        "UNIT": unit,
        "POSITIONS": cut.rows,
        "CHANNELS": cut.width,
    }
    rest = multiplier, bias, residual, residual_multiplier, residual_zero, relu, grid
    epilogue, stored = epilogue_arguments(y, rest)
    constants |= stored
    images = x, x.shape[2], x.shape[3], x_zero
    walk = channels // unit, cut.down, cut.right, cut.positions, cut.tiles
    filters = weight, neighbors(weight_zero)
    if taps > MOST_TAPS:
        args = images, filters, walk, pads, epilogue
        launch(kernels.large, cut.programs, x, *args, **constants)
        return y
    constants |= {"TALL": cut.block[0], "BROAD": cut.block[1]}
    args = images, filters, walk, size, pads, epilogue
    launch(kernels.blocks, cut.programs, x, *args, **constants)
    return y


@dataclass(frozen=True)
class Cut:
    """An output in blocks, these in tiles, and how many of them a program takes."""

    block: tuple[int, int]
    rows: int  # of a tile: positions,
    width: int  # and channels
    down: int  # positions along the height of an image
    right: int
    positions: int  # of all images
    tiles: int  # of a program
    programs: int


def _cut(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    others: tuple[int, int],
) -> Cut:
    """Of outputs of ``size`` in so many images and channels, ``others``."""
    batch, channels = others
    taps = math.prod(kernel)
    block_ = blocks_of(size, kernel, stride, dilation, batch * channels)
    width = min(triton.next_power_of_2(channels), block(channels, MOST_CHANNELS))
    rows = THREADS * vector_of(taps) // width
    down, right = (triton.cdiv(n, b) for n, b in zip(size, block_, strict=True))
    positions, across = batch * down * right, triton.cdiv(channels, width)
    programs = triton.cdiv(positions, rows) * across
    tiles = 1 if taps > MOST_TAPS else max(1, min(MOST_TILES, programs // ENOUGH_PROGRAMS))
    programs = triton.cdiv(positions, rows * tiles) * across
    return Cut(block_, rows, width, down, right, positions, tiles, programs)


def vector_of(taps: int) -> int:
    """Channels of a thread, which holds a filter for each."""
    return next((vector for vector in (4, 2) if vector * taps <= 64), 1)


@functools.lru_cache(maxsize=4096)
def blocks_of(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    others: int,
) -> tuple[int, int]:
    """Height and width of the blocks that take least work; ``others``: images times channels."""
    taps = math.prod(kernel)
    vector = vector_of(taps)

    def reads(block: tuple[int, int]) -> int:
        sides = zip(block, kernel, stride, dilation, strict=True)
        return math.prod((b - 1) * s + (k - 1) * d + 1 for b, k, s, d in sides)

    def work(block: tuple[int, int]) -> float:
        """In multiply-adds: about three to read a pixel, and eight to write an output."""
        count = math.prod(triton.cdiv(n, b) for n, b in zip(size, block, strict=True))
        return count * (math.prod(block) * (taps + 8) + 3 * reads(block))

    def allowed(block: tuple[int, int]) -> bool:
        sums = math.prod(block)
        threads = others * math.prod(size) / (sums * vector)
        enough = threads >= THREADS * ENOUGH_PROGRAMS / 4
        return sums == 1 or (enough and vector * (taps + sums) + 2 * reads(block) <= REGISTERS)

    if taps > MOST_TAPS:
        return 1, 1
    return min(filter(allowed, itertools.product((1, 2, 4, 7), (1, 2, 4))), key=work)

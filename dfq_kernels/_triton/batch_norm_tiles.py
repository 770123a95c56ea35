"""How batch_norm cuts tensors of one shape [B, C, ...], of any strides, into tiles.

A tensor is walked as a matrix. A column belongs to one channel, ``run`` columns to each, and the
rows are numbered by the dimensions that are left:

    channels innermost        run = 1            a row is a position, as wide as the channels
    planes                    run = unit         a row is a vector within a plane
    planes too short for it   run = the plane    a row is a sample, as wide as channels * plane

A program takes one block of columns and ``iterations`` tiles below one another. All of it follows
from shape, strides and dtype alone, and so does the order of every sum.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

WARPS = 4
VECTOR = 16  # bytes that a thread loads at once
PROGRAMS = 4 * 132  # four for each multiprocessor of an H200: so many run at once
MOST_ITERATIONS = 128  # the rounding errors of a program's sums grow with them
SHORT_PLANE = 256  # bytes; shorter ones are joined across channels,
ENOUGH_ROWS = 16  # if there are so many to sum: what is stored is the sums of each column
WIDTHS = (128, 64, 32)  # of a block, if it does not hold all columns


@dataclass(frozen=True)
class Dimension:
    """A dimension, or several that every tensor walks as one."""

    size: int
    strides: tuple[int, ...]  # of each tensor

    def holds(self, faster: Dimension) -> bool:
        """Whether ``faster`` continues within this one."""
        pairs = zip(self.strides, faster.strides, strict=True)
        return all(slow == fast * faster.size for slow, fast in pairs)

    def split(self, unit: int) -> Dimension:
        """This one in steps of ``unit``."""
        return Dimension(self.size // unit, tuple(stride * unit for stride in self.strides))


@dataclass(frozen=True)
class Matrix:
    """What is walked: the dimensions of a row's number, fastest first, and of a column's."""

    rows: tuple[Dimension, ...]
    columns: int
    run: int
    block: Dimension  # of all columns; its strides lead from block to block
    column_strides: tuple[int, ...]  # within a block
    unit: int  # divides the strides of rows and blocks, and the number of columns


@dataclass(frozen=True)
class Tiling:
    """A matrix cut into tiles, in the words of the kernels."""

    rows: int
    columns: int
    run: int
    unit: int
    height: int  # rows of a tile
    width: int  # its columns
    iterations: int  # tiles of a program
    splits: int  # programs of a block of columns
    sizes: tuple[int, ...]  # of the dimensions of a row's number, without the slowest
    column_strides: tuple[int, ...]  # of each tensor
    strides: tuple[tuple[int, ...], ...]  # of each tensor: of a block and of those dimensions
    wide: bool  # offsets take 64 bits

    @property
    def channels(self) -> int:
        """Of the tensors."""
        return self.columns // self.run

    @property
    def count(self) -> int:
        """Elements of one channel."""
        return self.rows * self.run

    @property
    def programs(self) -> int:
        """That it takes to walk the matrix."""
        return self.splits * _ceil_div(self.columns, self.width)


def tile(x: Tensor, *others: Tensor) -> Tiling:
    """Tiles of ``x`` and ``others`` of its shape, along the memory order of the last of them."""
    strides = tuple(tensor.stride() for tensor in (x, *others))
    return _tile(tuple(x.shape), strides, VECTOR // x.element_size())


@functools.lru_cache(maxsize=4096)
def _tile(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], vector: int) -> Tiling:
    matrix = _matrix(shape, strides, vector)
    height = max(1, WARPS * 32 * vector // matrix.block.size)
    rows = math.prod(dim.size for dim in matrix.rows)
    splits = _splits(_ceil_div(matrix.columns, matrix.block.size))
    iterations = min(_ceil_div(_ceil_div(rows, height), splits), MOST_ITERATIONS)
    ways = zip(*(dim.strides for dim in (matrix.block, *matrix.rows)), strict=True)
    return Tiling(
        rows=rows,
        columns=matrix.columns,
        run=matrix.run,
        unit=matrix.unit,
        height=height,
        width=matrix.block.size,
        iterations=iterations,
        splits=_ceil_div(rows, height * iterations),
        sizes=tuple(dim.size for dim in matrix.rows[:-1]),
        column_strides=matrix.column_strides,
        strides=tuple(tuple(step // matrix.unit for step in way) for way in ways),
        wide=max(rows, *(_extent(shape, steps) for steps in strides)) >= 2**31 - 2**20,
    )


def _matrix(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...], vector: int) -> Matrix:
    channel, *outer = _dimensions(shape, strides)
    outer = _joined(outer) or [Dimension(1, (0,) * len(strides))]
    plane, rows = outer[0], outer[1:]
    if plane.size == 1 or (channel.size > 1 and channel.strides[-1] < plane.strides[-1]):
        return _blocks(channel.size, 1, channel.strides, outer, vector)
    short = plane.size % vector != 0 or plane.size * VECTOR // vector < SHORT_PLANE
    if short and channel.holds(plane) and math.prod(dim.size for dim in rows) >= ENOUGH_ROWS:
        return _blocks(channel.size * plane.size, plane.size, plane.strides, rows, vector)
    unit = math.gcd(vector, plane.size, *_strides((channel, *rows)))
    if plane.size > unit or not rows:
        rows = [plane.split(unit), *rows]
    block = Dimension(unit, channel.strides)
    return Matrix(tuple(rows), channel.size * unit, unit, block, plane.strides, unit)


def _blocks(
    columns: int, run: int, strides: tuple[int, ...], rows: list[Dimension], vector: int
) -> Matrix:
    """Neighboring columns, several channels to a block."""
    unit = math.gcd(vector, columns, *_strides(rows))
    width = 1 << (columns - 1).bit_length()
    if width > WIDTHS[-1]:
        width = min(WIDTHS, key=lambda width: _ceil_div(columns, width) * width)
    block = Dimension(width, tuple(stride * width for stride in strides))
    return Matrix(tuple(rows), columns, run, block, strides, unit)


def _splits(blocks: int) -> int:
    """Programs of a block: so many as run at once, or so many more that the last do not matter."""
    if blocks >= PROGRAMS:
        return 1
    return (PROGRAMS if blocks * 4 <= PROGRAMS else PROGRAMS * 4) // blocks


def _dimensions(shape: tuple[int, ...], strides: tuple[tuple[int, ...], ...]) -> list[Dimension]:
    """The channels', and the others in the memory order of the last tensor, fastest first."""
    dims = [Dimension(*dim) for dim in zip(shape, zip(*strides, strict=True), strict=True)]
    channel = dims.pop(1)
    outer = (dim for dim in dims if dim.size != 1)
    return [channel, *sorted(outer, key=lambda dim: dim.strides[-1])]


def _joined(dims: list[Dimension]) -> list[Dimension]:
    joined: list[Dimension] = []
    for dim in dims:
        if joined and dim.holds(joined[-1]):
            joined[-1] = Dimension(joined[-1].size * dim.size, joined[-1].strides)
        else:
            joined.append(dim)
    return joined


def _strides(dims: Iterable[Dimension]) -> list[int]:
    return [stride for dim in dims for stride in dim.strides]


def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The offset of the last element."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)

"""How a kernel walks over tensors of any strides: as rows of columns, in the output's memory order.

The channel, if there is one, belongs to the row (planes, weights) or to the column (channels last;
and planes too short for wide loads, ``run`` columns to each). Dimensions that follow one another in
every tensor are one, so that a dense tensor has one row dimension and one column dimension.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

VECTOR = 8  # elements: 16 bytes, or 32
ENOUGH_ROWS = 16  # for a program to compute the grid of each column


@dataclass(frozen=True)
class Side:
    """The dimensions that count the rows, or the columns; strides in elements, one per input."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    @property
    def extent(self) -> int:
        """The largest number that counting along this side meets."""
        ways = (zip(self.sizes, steps, strict=True) for steps in self.strides)
        return max(self.count, *(sum(n * abs(step) for n, step in way) for way in ways))


@dataclass(frozen=True)
class Layout:
    """Rows and columns; every tensor has the same."""

    rows: Side
    columns: Side
    channels: int
    run: int = 0  # the channel is column // run, or if 0 the row; modulo ``channels``

    @property
    def contiguous(self) -> bool:
        """Whether the columns of a row are neighbours in every tensor."""
        return all(strides == (1,) for strides in self.columns.strides)

    @property
    def vector(self) -> int:
        """What rows are loaded in; divides the way to the next one, if columns are neighbours."""
        if not self.contiguous:
            return 1
        if self.rows.count == 1 and not self.run:
            return VECTOR  # the few columns that remain are a tile of their own
        steps = [step for strides in self.rows.strides for step in strides]
        return math.gcd(VECTOR, self.columns.count, *steps)


def layout_of(output: Tensor, inputs: tuple[Tensor, ...], axis: int | None) -> Layout:
    """``output`` is dense and not empty, ``inputs`` are of its shape."""
    strides = tuple(tensor.stride() for tensor in inputs)
    return layout_of_strides(output.shape, output.stride(), strides, axis)


@functools.lru_cache(maxsize=4096)
def layout_of_strides(
    shape: tuple[int, ...],
    output: tuple[int, ...],
    inputs: tuple[tuple[int, ...], ...],
    axis: int | None,
) -> Layout:
    """As layout_of, for tensors of this shape and these strides."""
    order = sorted((d for d in range(len(shape)) if shape[d] != 1), key=lambda d: -output[d])
    dims = [(shape[d], tuple(strides[d] for strides in inputs)) for d in order]
    count = len(inputs)
    if axis not in order:
        dims = _merged(dims)
        # more than one row only where each is a run of neighbours in every input
        split = len(dims) - 1 if dims and set(dims[-1][1]) == {1} else 0
        channels = 1 if axis is None else shape[axis]
        return Layout(_side(dims[:split], count), _side(dims[split:], count), channels)
    at = order.index(axis)
    if at == len(order) - 1:
        rows, columns = _side(_merged(dims[:at]), count), _side(dims[at:], count)
        return _joined(Layout(rows, columns, shape[axis], run=1))
    plane, whole = _merged(dims[at + 1 :]), _merged(dims[at:])
    short = plane[0][0] % VECTOR and math.prod(n for n, _ in dims[:at]) >= ENOUGH_ROWS
    if short and len(whole) == 1 and set(whole[0][1]) == {1}:
        rows, columns = _side(_merged(dims[:at]), count), _side(whole, count)
        return _joined(Layout(rows, columns, shape[axis], run=plane[0][0]))
    return Layout(_side(_merged(dims[: at + 1]), count), _side(plane, count), shape[axis])


Dims = list[tuple[int, tuple[int, ...]]]  # size, and stride in each input; slowest first


def _merged(dims: Dims) -> Dims:
    merged: Dims = []
    for size, strides in dims:
        if merged and merged[-1][1] == tuple(size * stride for stride in strides):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    return merged


def _side(dims: Dims, inputs: int) -> Side:
    if not dims:
        return Side((1,), ((0,),) * inputs)
    sizes = tuple(size for size, _ in dims)
    return Side(sizes, tuple(tuple(strides[i] for _, strides in dims) for i in range(inputs)))


def _joined(layout: Layout, longest: int = 128) -> Layout:
    """Short rows that follow one another, as fewer and longer rows: wide loads for 3 channels."""
    length, rows = layout.columns.count, layout.rows
    if not layout.contiguous or any(strides != (length,) for strides in rows.strides):
        return layout
    together = 1
    while 2 * together * length <= longest and rows.count % (2 * together) == 0:
        together *= 2
    length *= together
    ours = Side((rows.count // together,), tuple((length,) for _ in rows.strides))
    columns = Side((length,), layout.columns.strides)
    return Layout(ours, columns, layout.channels, layout.run)


def block(length: int, longest: int) -> int:
    """The longest block, a power of two, that wastes less than 3 of 10 lanes; else the tightest."""
    sizes = [longest >> i for i in range(longest.bit_length() - 4)]

    def used(size: int) -> float:
        return length / (triton.cdiv(length, size) * size)

    return next((size for size in sizes if used(size) > 0.7), max(sizes, key=used))


@triton.jit
def offsets(index, sizes, strides):
    """Where the elements lie whose index counts through ``sizes``, the last one fastest."""
    offset = tl.zeros_like(index)
    for d in tl.static_range(len(sizes) - 1, 0, -1):
        offset += (index % sizes[d]) * strides[d]
        index = index // sizes[d]
    return offset + index * strides[0]

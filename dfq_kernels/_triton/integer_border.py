"""What a zero of the activations other than 0 takes from the sums.

Beyond the border a load gives 0, not ``x_zero``, so the sum of ``x * w`` lacks
``-x_zero * sum(w - w_zero)`` over the taps within the image. Which taps these are depends on how
far from the edges a pixel lies: few classes of rows and of columns, for which a table is computed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels._triton import integer_nibbles
from dfq_kernels._triton.integer_plan import Layer, power_of_two
from dfq_kernels._triton.launch import launch

_ELEMENTS = 4096  # of a tile


@dataclass(frozen=True)
class Classes:
    """Of an output's rows, or columns: ``first`` of one each, one of all between, the last."""

    count: int
    first: int
    skip: int  # indices that the rest has beyond one

    @property
    def arguments(self) -> tuple[int, int, int]:
        return self.count, self.first, self.skip


def classes(layer: Layer, side: int) -> Classes:
    """Along height (0) or width (1)."""
    out, stride, padding = layer.out_size[side], layer.stride[side], layer.padding[side]
    reach = (layer.kernel[side] - 1) * layer.dilation[side] - padding
    first = min(out, -(-padding // stride))
    whole = min(out, max(0, (layer.size[side] - 1 - reach) // stride + 1))  # see the last tap
    if first >= whole:
        return Classes(out, out, 0)  # each is its own
    return Classes(first + 1 + out - whole, first, whole - first - 1)


@functools.lru_cache(maxsize=4096)
def border_geometry(layer: Layer) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """For the kernels, along height and width: how many classes, and how they are counted."""
    return classes(layer, 0).arguments, classes(layer, 1).arguments


def border_table(
    layer: Layer, weight: Tensor, weight_zero: Tensor | None, x_zero: int
) -> Tensor | None:
    """[classes, outputs], int32; None if ``x_zero`` is 0."""
    if x_zero == 0:
        return None
    rows, columns = border_geometry(layer)
    table = torch.empty(
        rows[0] * columns[0], layer.outputs, dtype=torch.int32, device=weight.device
    )
    taps = power_of_two(layer.taps)
    depth = min(power_of_two(layer.group_inputs), max(16, 1024 // taps))
    block = max(1, _ELEMENTS // (taps * depth))
    geometry = (layer.kernel[1], *layer.size, layer.stride, layer.padding, layer.dilation)
    launch(
        border_kernel,
        triton.cdiv(layer.outputs, block),
        weight,
        *(weight, weight_zero, table, x_zero, weight.numel() // layer.outputs),
        *(layer.outputs, layer.taps, layer.group_inputs, geometry, rows, columns),
        OUTPUTS=block,
        TAPS=taps,
        DEPTH=depth,
        num_warps=4,
    )
    return table


@triton.jit
def border_row(row, column, rows, columns):
    """The row of the table for the output pixels at ``row`` and ``column``."""
    return _class_of(row, rows) * columns[0] + _class_of(column, columns)


@triton.jit
def _class_of(index, kinds):
    _, first, skip = kinds
    return tl.minimum(index, first) + tl.maximum(index - first - skip, 0)


@triton.jit
def _inside(kind, kinds, tap, stride, padding, dilation, size):
    """Whether the taps see the image from the rows, or columns, of a class."""
    _, first, skip = kinds
    index = kind + tl.where(kind > first, skip, 0)
    place = index * stride - padding + tap * dilation
    return (place >= 0) & (place < size)


@triton.jit
def border_kernel(
    weight, weight_zero, table, x_zero, row_stride, outputs, taps, inputs, geometry, rows, columns,
    OUTPUTS: tl.constexpr, TAPS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    kernel_width, height, width, stride, padding, dilation = geometry
    channel = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    tap = tl.arange(0, TAPS)
    sums = tl.zeros((OUTPUTS, TAPS), tl.int32)
    known = (channel < outputs)[:, None, None] & (tap < taps)[None, :, None]
    for start in range(0, inputs, DEPTH):
        k = start + tl.arange(0, DEPTH)
        mask = known & (k < inputs)[None, None, :]
        place = (tap[:, None] * inputs + k[None, :])[None, :, :]
        row = weight + channel.to(tl.int64)[:, None, None] * row_stride
        if weight.dtype.element_ty == tl.uint8:
            values = integer_nibbles.gather(row, place, mask).to(tl.int32) >> 4
        else:
            values = tl.load(row + place, mask=mask, other=0).to(tl.int32)
        sums += tl.sum(values, 2)
    if weight_zero is not None:
        zero = tl.load(weight_zero + channel, mask=channel < outputs, other=0).to(tl.int32)
        sums -= (inputs * zero)[:, None]
    vertical, horizontal = tap // kernel_width, tap % kernel_width
    for kind in range(rows[0] * columns[0]):
        row, column = kind // columns[0], kind % columns[0]
        seen = _inside(row, rows, vertical, stride[0], padding[0], dilation[0], height)
        seen &= _inside(column, columns, horizontal, stride[1], padding[1], dilation[1], width)
        total = tl.sum(tl.where((seen & (tap < taps))[None, :], sums, 0), 1)
        tl.store(table + kind * outputs + channel, -x_zero * total, mask=channel < outputs)

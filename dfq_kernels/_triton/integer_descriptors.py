"""An integer layer as a product of matrices whose tiles the tensor copy engine of sm_90 fetches.

A tile of the input is a box of pixels, moved by a tap; what of it lies beyond the image, the engine
fills with zeros. With strides of 2 the rows and columns are seen in pairs, so that a tap's pixels
are neighbours again: [B, H / 2, 2, W / 2, 2 * C].

The outputs are the rows of the product: the weights may then be unpacked in registers, a box of
pixels goes from shared memory into the tensor cores as it is, and the accumulators take fewer
registers than the other way around.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dfq_kernels._triton import integer_nibbles
from dfq_kernels._triton.integer_border import border_geometry, border_row
from dfq_kernels._triton.integer_epilogue import Epilogue, finish
from dfq_kernels._triton.integer_plan import Layer, Tile
from dfq_kernels._triton.integer_products import ROWS_TOGETHER, dot, next_slice, program
from dfq_kernels._triton.launch import launch


def run_descriptors(
    layer: Layer,
    tile: Tile,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    epilogue: Epilogue,
    assembler: bool,
) -> None:
    """``tensors``: x, weight, the weights' zero, and the table of integer_border."""
    x, weight, weight_zero, border = tensors
    values, constants = epilogue
    sides = (layer.batch, *layer.out_size)
    boxes = [triton.cdiv(n, part) for n, part in zip(sides, tile.box, strict=True)]
    rows = triton.cdiv(layer.pixels, tile.pixels) if layer.plain else math.prod(boxes)
    columns = triton.cdiv(layer.outputs, tile.outputs)
    launch(
        descriptors_kernel,
        rows * columns,
        x,
        _of_x(layer, tile, x),
        _of_weight(layer, tile, weight),
        *(weight_zero, border, values, rows, columns),
        (*sides, layer.channels, layer.outputs, layer.pixels, *boxes[1:]),
        (*layer.padding, *layer.dilation),
        border_geometry(layer),
        **constants,
        KERNEL=layer.kernel,
        KIND="plain" if layer.plain else "pairs" if layer.stride == (2, 2) else "images",
        PADDED=layer.padded,
        X4=x.dtype == torch.uint8,
        W4=weight.dtype == torch.uint8,
        BOX=tile.box,
        PIXELS=tile.pixels,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        ASM=assembler,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _of_x(layer: Layer, tile: Tile, x: Tensor) -> TensorDescriptor:
    halves = 2 if x.dtype == torch.uint8 else 1
    channels, depth = layer.channels // halves, tile.depth // halves
    height, width = layer.size
    if layer.plain:
        shape, box = [layer.pixels, channels], [tile.pixels, depth]
    elif layer.stride == (1, 1):
        shape, box = [layer.batch, height, width, channels], [*tile.box, depth]
    else:
        shape = [layer.batch, height // 2, 2, width // 2, 2 * channels]
        box = [tile.box[0], tile.box[1], 1, tile.box[2], depth]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return TensorDescriptor(x, shape, strides, box)


def _of_weight(layer: Layer, tile: Tile, weight: Tensor) -> TensorDescriptor:
    length = weight.numel() // layer.outputs
    depth = tile.depth // 2 if weight.dtype == torch.uint8 else tile.depth
    return TensorDescriptor(weight, [layer.outputs, length], [length, 1], [tile.outputs, depth])


@triton.jit
def _load_x(
    x, corner, tap_row, tap_column, start, channels, window,
    KIND: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[pixels, bytes] as the tap sees them; ``corner`` of the tile in the output."""
    pad_h, pad_w, dilation_h, dilation_w = window
    if KIND == "plain":
        values = x.load([corner[0], start])
    else:
        row, column = tap_row * dilation_h - pad_h, tap_column * dilation_w - pad_w
        if KIND == "images":
            box = x.load([corner[0], corner[1] + row, corner[2] + column, start])
        else:
            place = (column & 1) * channels + start
            box = x.load(
                [corner[0], corner[1] + (row >> 1), row & 1, corner[2] + (column >> 1), place]
            )
        values = box.reshape(ROWS, DEPTH)
    return values


@triton.jit
def _pixels(tile, sizes, BOX: tl.constexpr, PIXELS: tl.constexpr, PLAIN: tl.constexpr):
    """The corner of a tile, and of its pixels: index, whether they exist, row and column."""
    batch, out_height, out_width, _, _, pixels, high, wide = sizes
    lane = tl.arange(0, PIXELS)
    if PLAIN:
        pixel = tile.to(tl.int64) * PIXELS + lane
        corner = (tile * PIXELS, 0, 0)
        known, row, column = pixel < pixels, lane, lane
    else:
        corner = (
            tile // (wide * high) * BOX[0], tile // wide % high * BOX[1], tile % wide * BOX[2]
        )  # fmt: skip
        image = corner[0] + lane // (BOX[1] * BOX[2])
        row = corner[1] + lane // BOX[2] % BOX[1]
        column = corner[2] + lane % BOX[2]
        known = (image < batch) & (row < out_height) & (column < out_width)
        pixel = (image.to(tl.int64) * out_height + row) * out_width + column
    return corner, pixel, known, row, column


@triton.jit
def descriptors_kernel(
    x, weight, weight_zero, border, epilogue, rows, columns, sizes, window, kinds,
    STORED: tl.constexpr, KERNEL: tl.constexpr, KIND: tl.constexpr, PADDED: tl.constexpr,
    X4: tl.constexpr, W4: tl.constexpr, BOX: tl.constexpr, PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    channels, outputs = sizes[3], sizes[4]
    tile, tile_column = program(rows, columns, ROWS_TOGETHER)
    corner, pixel, known, row, column = _pixels(tile, sizes, BOX, PIXELS, KIND == "plain")
    first = tile_column * OUTPUTS
    length = channels // 2 if X4 else channels  # bytes
    X_BYTES: tl.constexpr = DEPTH // 2 if X4 else DEPTH

    sums = tl.zeros((OUTPUTS, PIXELS), tl.int32)
    totals = tl.zeros((PIXELS, 16), tl.int32)
    ones = tl.full((16, DEPTH), 1, tl.int8)
    start, tap, tap_row, tap_column = 0, 0, 0, 0
    for _ in range(KERNEL[0] * KERNEL[1] * tl.cdiv(channels, DEPTH)):
        at = start // 2 if X4 else start
        a = _load_x(
            x, corner, tap_row, tap_column, at, length, window, KIND, PIXELS, X_BYTES
        )  # fmt: skip
        k = tap * channels + start
        w = weight.load([first, k // 2 if W4 else k])
        if X4:
            a = integer_nibbles.whole(a, ASM)
        if W4:
            w = integer_nibbles.whole(w, ASM)
        sums = dot(a, w, sums, True)
        if weight_zero is not None:
            totals = dot(a, ones, totals, False)
        start, tap, tap_row, tap_column = next_slice(
            start + DEPTH, tap, tap_row, tap_column, channels, KERNEL
        )
    sums = tl.trans(sums) >> ((4 if X4 else 0) + (4 if W4 else 0))
    channel = first + tl.arange(0, OUTPUTS)
    known_channel = channel < outputs
    if weight_zero is not None:
        zero = tl.load(weight_zero + channel, mask=known_channel, other=0).to(tl.int32)
        sums -= (tl.sum(totals, 1) >> (8 if X4 else 4))[:, None] * zero[None, :]  # 16 alike
    border_at = None
    if PADDED and border is not None:
        last_row, last_column = sizes[1] - 1, sizes[2] - 1
        border_at = border_row(
            tl.minimum(row, last_row), tl.minimum(column, last_column), kinds[0], kinds[1]
        )
    finish(sums, pixel, known, channel, known_channel, border, border_at, outputs, epilogue, STORED)

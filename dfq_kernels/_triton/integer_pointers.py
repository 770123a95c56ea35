"""An integer layer of any geometry as a product of matrices, each tile gathered by pointers.

Rows of the product are output pixels, columns are output channels, K runs through taps and input
channels. Beyond the border a load gives 0 (anything else would leave the asynchronous copies).
Groups of few channels are computed together, as one group whose weights are block-diagonal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels._triton import integer_nibbles
from dfq_kernels._triton.integer_border import border_geometry, border_row
from dfq_kernels._triton.integer_epilogue import Epilogue, finish
from dfq_kernels._triton.integer_plan import WIDE, Layer, Tile, splits_into_halves
from dfq_kernels._triton.integer_products import ROWS_TOGETHER, dot, next_slice, program
from dfq_kernels._triton.launch import launch

MOST_BITS = tl.constexpr(31)  # taps whose mask fits a register


def run_pointers(
    layer: Layer,
    tile: Tile,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    epilogue: Epilogue,
    assembler: bool,
) -> None:
    """``tensors``: x, weight, the weights' zero, and the table of integer_border."""
    x, weight, *_ = tensors
    values, constants = epilogue
    rows = triton.cdiv(layer.pixels, tile.pixels)
    blocks = triton.cdiv(layer.groups, tile.together)
    of_block = triton.cdiv(tile.together * layer.group_outputs, tile.outputs)
    halves = splits_into_halves(layer)
    launch(
        pointers_kernel,
        rows * blocks * of_block,
        x,
        *tensors,
        weight.numel() // layer.outputs,
        values,
        rows,
        (*layer.size, layer.channels, *layer.out_size, layer.outputs, layer.pixels),
        (*layer.stride, *layer.padding, *layer.dilation),
        (layer.group_inputs, layer.group_outputs, blocks * of_block),
        border_geometry(layer),
        **constants,
        KERNEL=layer.kernel,
        KIND="plain" if layer.plain else "padded" if layer.padded else "inside",
        NIBBLES="" if weight.dtype == torch.int8 else "halves" if halves else "gather",
        PIXELS=tile.pixels,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        TOGETHER=tile.together,
        WHOLE=tile.together == 1 and layer.group_inputs % tile.depth == 0,
        SWAP=tile.swap,
        LONG=reaches_far(layer, tile),
        ASM=assembler,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def reaches_far(layer: Layer, tile: Tile) -> bool:
    """Whether offsets from the first image of a tile, or the number of pixels, leave int32."""
    image = layer.size[0] * layer.size[1] * layer.channels
    images = tile.pixels // max(1, layer.out_size[0] * layer.out_size[1]) + 2
    margin = layer.channels * layer.size[1] * (layer.kernel[0] * layer.dilation[0] + 1)
    return image * images + margin >= WIDE or layer.pixels + tile.pixels >= WIDE


@triton.jit
def _places(first, pixel, known, sizes, window, KERNEL: tl.constexpr, KIND: tl.constexpr):
    """Where each pixel's window begins: from the tile's first image, in rows, in columns.

    And the bits of the taps that lie within the image.
    """
    height, width, _, out_height, out_width, _, _ = sizes
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w = window
    row = pixel // out_width % out_height
    image = pixel // (out_width * out_height) - first // (out_width * out_height)
    top, left = row * stride_h - pad_h, pixel % out_width * stride_w - pad_w
    seen = tl.zeros_like(pixel).to(tl.int32)
    if KIND == "padded" and KERNEL[0] * KERNEL[1] <= MOST_BITS:
        for tap in tl.static_range(KERNEL[0] * KERNEL[1]):
            inside = _inside(
                top + tap // KERNEL[1] * dilation_h, left + tap % KERNEL[1] * dilation_w, sizes
            )
            seen |= (known & inside).to(tl.int32) << tap
    return (image * height + top) * width + left, top, left, seen


@triton.jit
def _inside(row, column, sizes):
    return (row >= 0) & (row < sizes[0]) & (column >= 0) & (column < sizes[1])


@triton.jit
def pointers_kernel(
    x, weight, weight_zero, border, row_length, epilogue, rows, sizes, window, groups, kinds,
    STORED: tl.constexpr, KERNEL: tl.constexpr, KIND: tl.constexpr, NIBBLES: tl.constexpr,
    PIXELS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, TOGETHER: tl.constexpr,
    WHOLE: tl.constexpr, SWAP: tl.constexpr, LONG: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    height, width, channels, out_height, out_width, outputs, pixels = sizes
    group_inputs, group_outputs, tiles = groups
    tile, column = program(rows, tiles, ROWS_TOGETHER)
    first = tile.to(tl.int64) * PIXELS if LONG else tile * PIXELS
    pixel = first + tl.arange(0, PIXELS)
    known = pixel < pixels

    # the tile's outputs, and the inputs of their groups
    inputs, of_block = TOGETHER * group_inputs, TOGETHER * group_outputs
    block = column // tl.cdiv(of_block, OUTPUTS)
    local = column % tl.cdiv(of_block, OUTPUTS) * OUTPUTS + tl.arange(0, OUTPUTS)
    channel = block * of_block + local
    known_channel = (local < of_block) & (channel < outputs)
    row = weight + tl.minimum(channel, outputs - 1).to(tl.int64)[:, None] * row_length

    PACKED: tl.constexpr = x.dtype.element_ty == tl.uint8
    length = channels // 2 if PACKED else channels
    reached = tl.where(known, pixel, first)  # others read what is there, for nothing
    x += block * inputs
    if KIND == "plain":
        x += tile.to(tl.int64) * (PIXELS * length)
        corner = (reached - first).to(tl.int32) * length
        top, left, seen = corner, corner, corner
    else:
        x += (first // (out_width * out_height)).to(tl.int64) * height * width * length
        corner, top, left, seen = _places(first, reached, known, sizes, window, KERNEL, KIND)
        corner *= length

    SPLIT: tl.constexpr = PACKED or NIBBLES == "halves"
    lanes = tl.arange(0, DEPTH // 2 if SPLIT else DEPTH)
    sums = tl.zeros((OUTPUTS, PIXELS) if SWAP else (PIXELS, OUTPUTS), tl.int32)
    totals = tl.zeros((PIXELS, OUTPUTS if TOGETHER > 1 else 16), tl.int32)
    ones = tl.full((16, lanes.shape[0]), 1, tl.int8)
    start, tap, tap_row, tap_column = 0, 0, 0, 0
    for _ in range(KERNEL[0] * KERNEL[1] * tl.cdiv(inputs, DEPTH)):
        mask = None
        if KIND == "padded":
            if KERNEL[0] * KERNEL[1] <= MOST_BITS:
                mask = ((seen >> tap) & 1 != 0)[:, None]
            else:
                inside = _inside(top + tap_row * window[4], left + tap_column * window[5], sizes)
                mask = (known & inside)[:, None]
        shift = (tap_row * window[4] * width + tap_column * window[5]) * length
        window_row = (x + shift) + corner[:, None]
        limit = tl.minimum(inputs, channels - block * inputs)
        if SPLIT:
            a, b = _x_halves(window_row, mask, start, lanes, limit, WHOLE, ASM)
            lower, upper = _w_halves(row, start, tap, lanes, inputs, row_length, WHOLE, ASM)
            sums = dot(b, upper, dot(a, lower, sums, SWAP), SWAP)
            if weight_zero is not None:
                totals = dot(b, ones, dot(a, ones, totals, False), False)
        else:
            a = _load(window_row, mask, (start + lanes)[None, :], limit, WHOLE)
            w = _load_w(row, start + lanes, tap, local, groups, NIBBLES, TOGETHER, WHOLE)
            sums = dot(a, w, sums, SWAP)
            if weight_zero is not None:
                if TOGETHER > 1:
                    _, own = _of_group(start + lanes, local, groups)
                    totals = dot(a, own.to(tl.int8), totals, False)
                else:
                    totals = dot(a, ones, totals, False)
        start, tap, tap_row, tap_column = next_slice(
            start + DEPTH, tap, tap_row, tap_column, inputs, KERNEL
        )
    if SWAP:
        sums = tl.trans(sums)
    sums = sums >> ((4 if PACKED else 0) + (0 if NIBBLES == "" else 4))
    if weight_zero is not None:
        zero = tl.load(weight_zero + channel, mask=known_channel, other=0).to(tl.int32)
        if TOGETHER == 1:
            totals = (tl.sum(totals, 1) >> (8 if PACKED else 4))[:, None]  # 16 alike
        sums -= totals * zero[None, :]
    border_at = None
    if KIND == "padded" and border is not None:
        border_at = border_row(
            (reached // out_width % out_height).to(tl.int32),
            (reached % out_width).to(tl.int32), kinds[0], kinds[1],
        )  # fmt: skip
    place = pixel.to(tl.int64)
    finish(sums, place, known, channel, known_channel, border, border_at, outputs, epilogue, STORED)


@triton.jit
def _load(row, mask, k, limit, WHOLE: tl.constexpr):
    """Elements ``k`` of each row; beyond ``limit`` zeros, if not all of K is WHOLE tiles."""
    if not WHOLE:
        mask = k < limit if mask is None else mask & (k < limit)
    return tl.load(row + k) if mask is None else tl.load(row + k, mask=mask, other=0)


@triton.jit
def _x_halves(row, mask, start, lanes, limit, WHOLE: tl.constexpr, ASM: tl.constexpr):
    """The first and the second 32 elements of each block of 64; of packed x 16 times as large."""
    if row.dtype.element_ty == tl.uint8:
        byte = (start // 2 + lanes)[None, :]
        lower, upper = integer_nibbles.halves(_load(row, mask, byte, limit // 2, WHOLE), ASM)
    else:
        k = (start + lanes // 32 * 64 + lanes % 32)[None, :]
        lower = _load(row, mask, k, limit, WHOLE)
        upper = _load(row, mask, k + 32, limit, WHOLE)
    return lower, upper


@triton.jit
def _w_halves(
    row, start, tap, lanes, inputs, row_length, WHOLE: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    if row.dtype.element_ty == tl.uint8:
        byte = (tap * (inputs // 2) + start // 2 + lanes)[None, :]
        lower, upper = integer_nibbles.halves(_load(row, None, byte, row_length, WHOLE), ASM)
    else:
        k = (tap * inputs + start + lanes // 32 * 64 + lanes % 32)[None, :]
        lower = _load(row, None, k, row_length, WHOLE)
        upper = _load(row, None, k + 32, row_length, WHOLE)
    return lower, upper


@triton.jit
def _of_group(k, local, groups):
    """Where in its group's weights each input lies for each output; and whether it does."""
    group_inputs, group_outputs, _ = groups
    place = k[None, :] - (local // group_outputs * group_inputs)[:, None]
    return place, (place >= 0) & (place < group_inputs)


@triton.jit
def _load_w(
    row, k, tap, local, groups, NIBBLES: tl.constexpr, TOGETHER: tl.constexpr, WHOLE: tl.constexpr
):
    """[outputs, k]; of several groups only where input and output are of the same."""
    place, mask = k[None, :], (k < groups[0])[None, :]
    if TOGETHER > 1:
        place, mask = _of_group(k, local, groups)
    place += tap * groups[0]
    if NIBBLES == "gather":
        values = integer_nibbles.gather(row, place, mask)
    elif WHOLE:
        values = tl.load(row + place)
    else:
        values = tl.load(row + place, mask=mask, other=0)
    return values

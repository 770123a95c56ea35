"""qconv2d of images of at most 4 channels: a row of the filter is one slice of K.

With 4 bytes a pixel, the up to 8 pixels that a row of the filter sees are 32 bytes side by side,
as many as a tensor core takes at once: words that can be copied asynchronously, in place of a tap
of 3 useful bytes. Images of fewer channels and the weights are brought into that form first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dfq_kernels._triton import integer_nibbles
from dfq_kernels._triton.integer_border import border_geometry, border_row
from dfq_kernels._triton.integer_epilogue import Epilogue, finish
from dfq_kernels._triton.integer_plan import Layer, Tile
from dfq_kernels._triton.integer_products import ROWS_TOGETHER, dot, program
from dfq_kernels._triton.launch import launch

SLICE = tl.constexpr(32)  # bytes of a row of the filter
PIXEL = tl.constexpr(4)  # bytes
_PADDED_AT_ONCE = 1024  # pixels, or outputs


def run_stem(
    layer: Layer,
    tile: Tile,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    epilogue: Epilogue,
    assembler: bool,
) -> None:
    """``tensors``: x, weight, the weights' zero, and the table of integer_border."""
    x, weight, weight_zero, border = tensors
    values, constants = epilogue
    rows = triton.cdiv(layer.pixels, tile.pixels)
    columns = triton.cdiv(layer.outputs, tile.outputs)
    launch(
        stem_kernel,
        rows * columns,
        x,
        *(_four_channels(layer, x), _rows_of(layer, weight), weight_zero, border, values),
        *(rows, columns),
        (*layer.size, *layer.out_size, layer.outputs, layer.pixels),
        (*layer.stride, *layer.padding, layer.dilation[0]),
        border_geometry(layer),
        **constants,
        KERNEL=layer.kernel,
        PIXELS=tile.pixels,
        OUTPUTS=tile.outputs,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _four_channels(layer: Layer, x: Tensor) -> Tensor:
    """[B * H * W, 4]; the images themselves if they have 4 channels."""
    if layer.channels == 4:
        return x
    pixels = x.numel() // layer.channels
    padded = torch.empty(pixels, 4, dtype=torch.int8, device=x.device)
    programs = triton.cdiv(pixels, _PADDED_AT_ONCE)
    args = (x, padded, pixels, layer.channels)
    launch(pad_kernel, programs, x, *args, PIXELS=_PADDED_AT_ONCE, num_warps=4)
    return padded


def _rows_of(layer: Layer, weight: Tensor) -> Tensor:
    """[O, kh, 32], int8."""
    height, width = layer.kernel
    rows = torch.empty(layer.outputs, height, 32, dtype=torch.int8, device=weight.device)
    launch(
        rows_kernel,
        layer.outputs * height,
        weight,
        *(weight, rows, weight.numel() // layer.outputs, height, width, layer.channels),
        num_warps=1,
    )
    return rows


@triton.jit
def pad_kernel(x, padded, pixels, channels, PIXELS: tl.constexpr):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)[:, None]
    lane = tl.arange(0, PIXEL)[None, :]
    mask = pixel < pixels
    values = tl.load(x + pixel * channels + lane, mask=mask & (lane < channels), other=0)
    tl.store(padded + pixel * PIXEL + lane, values, mask=mask)


@triton.jit
def rows_kernel(weight, rows, row_length, height, width, channels):
    index = tl.program_id(0)
    output, row = index // height, index % height
    lane = tl.arange(0, SLICE)
    column, channel = lane // PIXEL, lane % PIXEL
    mask = (column < width) & (channel < channels)
    place = (row * width + column) * channels + channel
    if weight.dtype.element_ty == tl.uint8:
        values = integer_nibbles.gather(weight + output * row_length, place, mask) >> 4
    else:
        values = tl.load(weight + output * row_length + place, mask=mask, other=0)
    tl.store(rows + (lane + index * SLICE), values)


@triton.jit
def stem_kernel(
    x, weight, weight_zero, border, epilogue, rows, columns, sizes, window, kinds,
    STORED: tl.constexpr, KERNEL: tl.constexpr, PIXELS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    height, width, out_height, out_width, outputs, pixels = sizes
    stride_h, stride_w, pad_h, pad_w, dilation = window
    tile, tile_column = program(rows, columns, ROWS_TOGETHER)
    first = tile.to(tl.int64) * PIXELS
    image = first // (out_width * out_height)
    in_image = (first - image * (out_width * out_height)).to(tl.int32) + tl.arange(0, PIXELS)
    pixel = first + tl.arange(0, PIXELS)
    known = pixel < pixels
    row, column = in_image // out_width, in_image % out_width  # of images one above the other
    top = row % out_height * stride_h - pad_h
    left = column * stride_w - pad_w
    seen = tl.zeros((PIXELS,), tl.int32)
    ROWS: tl.constexpr = KERNEL[0]
    for i in tl.static_range(ROWS):
        at = top + i * dilation
        seen |= (known & (at >= 0) & (at < height)).to(tl.int32) << i
    lane = tl.arange(0, SLICE)
    place = left[:, None] + (lane // PIXEL)[None, :]
    inside = (place >= 0) & (place < width) & (lane < KERNEL[1] * PIXEL)[None, :]
    x += image * height * width * PIXEL
    corner = ((row // out_height * height + top) * width + left) * PIXEL
    channel = tile_column * OUTPUTS + tl.arange(0, OUTPUTS)
    known_channel = channel < outputs
    filters = weight + tl.minimum(channel, outputs - 1)[:, None] * (KERNEL[0] * SLICE)

    sums = tl.zeros((OUTPUTS, PIXELS), tl.int32)
    totals = tl.zeros((PIXELS, 16), tl.int32)
    for i in range(ROWS):
        mask = ((seen >> i) & 1 != 0)[:, None] & inside
        offset = corner[:, None] + (lane + i * dilation * width * PIXEL)[None, :]
        a = tl.load(x + offset, mask=mask, other=0)
        w = tl.load(filters + (lane + i * SLICE)[None, :])
        sums = dot(a, w, sums, True)
        if weight_zero is not None:
            totals = dot(a, tl.full((16, SLICE), 1, tl.int8), totals, False)
    sums = tl.trans(sums)
    if weight_zero is not None:
        zero = tl.load(weight_zero + channel, mask=known_channel, other=0).to(tl.int32)
        sums -= (tl.sum(totals, 1) >> 4)[:, None] * zero[None, :]  # 16 alike
    border_at = None
    if border is not None:
        border_at = border_row(row % out_height, column, kinds[0], kinds[1])
    finish(sums, pixel, known, channel, known_channel, border, border_at, outputs, epilogue, STORED)

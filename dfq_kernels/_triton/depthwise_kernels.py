"""The kernels of depthwise: tiles of positions and of channels, which are neighbours in memory.

In ``blocks`` a position is a block of TALL x BROAD outputs, and a thread has the filters of its
channels in registers: each pixel that outputs share is loaded and widened to int32 once, and added
to all sums that it belongs to. In ``large``, for filters of any size, a position is one output.

Arguments that belong together come as a tuple:

    images      x, its height and width, x_zero
    filters     weight and its zeros, or None
    walk        channels in units of UNIT; positions along the height of an image, along its width,
                and in all; tiles of a program
    out_size    height and width of the output
    padding     along height and width
    epilogue    as ``finish`` takes it, and STORED
"""

import triton
import triton.language as tl

from dfq_kernels._triton.integer_epilogue import channel_terms, finish


@triton.jit
def _tap(filters, channel, known, index, ROW: tl.constexpr):
    """Element ``index`` of the filter of each channel, less its zero; ROW: bytes of a filter."""
    weight, zeros = filters
    if weight.dtype.element_ty == tl.uint8:  # two in a byte: dfq_kernels/packing.py
        place = index // 64 * 32 + index % 32
        byte = tl.load(weight + channel * ROW + place, mask=known, other=0)
        upper = byte.to(tl.int32) << (4 - index % 64 // 32 * 4)
        value = (upper.to(tl.int8) >> 4).to(tl.int32)  # arithmetic: brings the sign
    else:
        value = tl.load(weight + channel * ROW + index, mask=known, other=0).to(tl.int32)
    if zeros is not None:
        value -= tl.load(zeros + channel, mask=known, other=0).to(tl.int32)
    return value


@triton.constexpr_function
def _tap_of(pixel, output, kernel, stride, dilation):
    """Which tap takes ``pixel`` to ``output``, (row, column) in a block; -1 if none does."""
    taps = []
    for at, out, k, step, gap in zip(pixel, output, kernel, stride, dilation, strict=True):
        tap, between = divmod(at - out * step, gap)
        if between or not 0 <= tap < k:
            return -1
        taps.append(tap)
    return taps[0] * kernel[1] + taps[1]


@triton.jit
def _plus(total, value, taps, TAP: tl.constexpr):
    if TAP >= 0:
        total += value * taps[TAP][None, :]
    return total


@triton.jit
def _add(sums, value, taps, PIXEL: tl.constexpr, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """``value``, of PIXEL of what a block reads, in each sum that it belongs to."""
    result = ()
    for i in tl.static_range(BLOCK[0]):
        for j in tl.static_range(BLOCK[1]):
            total = sums[i * BLOCK[1] + j]
            total = _plus(total, value, taps, _tap_of(PIXEL, (i, j), *WINDOW))
            result = result + (total,)  # noqa: RUF005
    return result


@triton.jit
def blocks(
    images, filters, walk, out_size, padding, epilogue,
    TALL: tl.constexpr, BROAD: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, MULTIPLE: tl.constexpr, ROW: tl.constexpr, UNIT: tl.constexpr,
    STORED: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (tiles of positions, tile of channels)."""
    x, height, width, x_zero = images
    out_height, out_width = out_size
    channels, down, right, positions, tiles = walk
    channels *= UNIT
    inputs = channels // MULTIPLE
    across = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    taps = ()
    begin = tl.zeros((CHANNELS,), tl.int32)  # of a sum: x_zero times the filter is taken from it
    for i in tl.static_range(KERNEL[0] * KERNEL[1]):
        taps = taps + (_tap(filters, channel, known, i, ROW),)  # noqa: RUF005
        begin -= x_zero * taps[i]
    begin = tl.broadcast_to(begin[None, :], (POSITIONS, CHANNELS))
    terms = channel_terms(channel, known, epilogue[1], epilogue[2])
    nothing = tl.cast(x_zero, tl.int8)
    for tile in range(tiles):
        position = (tl.program_id(0) // across * tiles + tile) * POSITIONS
        position += tl.arange(0, POSITIONS)
        there = position < positions
        image = (position // (down * right)).to(tl.int64)
        top, left = position // right % down * TALL, position % right * BROAD
        row, column = top * STRIDE[0] - padding[0], left * STRIDE[1] - padding[1]
        corner = (image * height + row) * width + column
        source = x + (corner * inputs)[:, None] + (channel // MULTIPLE)[None, :]
        sums = (begin,) * (TALL * BROAD)
        for v in tl.static_range((TALL - 1) * STRIDE[0] + (KERNEL[0] - 1) * DILATION[0] + 1):
            in_row = there & (row + v >= 0) & (row + v < height)
            for u in tl.static_range((BROAD - 1) * STRIDE[1] + (KERNEL[1] - 1) * DILATION[1] + 1):
                inside = in_row & (column + u >= 0) & (column + u < width)
                mask = inside[:, None] & known[None, :]
                at = source + (tl.cast(v * width, tl.int64) + u) * inputs
                value = tl.load(at, mask=mask, other=nothing).to(tl.int32)
                sums = _add(sums, value, taps, (v, u), (TALL, BROAD), (KERNEL, STRIDE, DILATION))
        pixel = (image * out_height + top) * out_width + left
        for i in tl.static_range(TALL):
            for j in tl.static_range(BROAD):
                inside = there & (top + i < out_height) & (left + j < out_width)
                at = pixel + (tl.cast(i * out_width, tl.int64) + j)
                total = sums[i * BROAD + j]
                finish(
                    total, at, inside, channel, known, None, None, channels, epilogue, STORED, terms
                )  # fmt: skip


@triton.jit
def large(
    images, filters, walk, padding, epilogue,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, MULTIPLE: tl.constexpr, ROW: tl.constexpr, UNIT: tl.constexpr,
    STORED: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (tile of positions, tile of channels)."""
    x, height, width, x_zero = images
    channels, down, right, positions, _ = walk
    channels *= UNIT
    inputs = channels // MULTIPLE
    across = tl.cdiv(channels, CHANNELS)
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    position = tl.program_id(0) // across * POSITIONS + tl.arange(0, POSITIONS)
    there = position < positions
    image = (position // (down * right)).to(tl.int64)
    row = position // right % down * STRIDE[0] - padding[0]
    column = position % right * STRIDE[1] - padding[1]
    corner = (image * height + row) * width + column
    source = x + (corner * inputs)[:, None] + (channel // MULTIPLE)[None, :]
    sums = tl.zeros((POSITIONS, CHANNELS), tl.int32)
    for tap in range(KERNEL[0] * KERNEL[1]):
        v, u = tap // KERNEL[1] * DILATION[0], tap % KERNEL[1] * DILATION[1]
        inside = there & (row + v >= 0) & (row + v < height)
        inside = inside & (column + u >= 0) & (column + u < width)
        mask = inside[:, None] & known[None, :]
        at = source + (tl.cast(v * width, tl.int64) + u) * inputs
        value = tl.load(at, mask=mask, other=tl.cast(x_zero, tl.int8)).to(tl.int32) - x_zero
        sums += value * _tap(filters, channel, known, tap, ROW)[None, :]
    pixel = position.to(tl.int64)
    finish(sums, pixel, there, channel, known, None, None, channels, epilogue, STORED)

"""The kernels of quantize: rows of columns as in fake_quantize_kernels.py, and planes.

``planes`` turns [C, H, W] to [H, W, C]: it reads a tile along the pixels and writes it along the
channels. Its ``walk``: strides of batch and channel, sizes and strides of the pixels, pixels, and
channels; the strides of x and pixels in units of VECTOR, channels in units of UNIT.
``parameters`` are scale, zero_point, quant_min, quant_max, offset.
"""

import triton
import triton.language as tl

from dfq_kernels._triton.arithmetic import make_grid, stored
from dfq_kernels._triton.fake_quantize_tiles import pointers, row_length
from dfq_kernels._triton.layout import offsets


@triton.jit
def _grid(parameters):
    """The inverse of scale, and the rest as ``stored`` wants it."""
    scale, zero_point, quant_min, quant_max, offset = parameters
    inverse, _, low, high = make_grid(tl.load(scale), tl.load(zero_point), quant_min, quant_max)
    return inverse, low, high, (quant_min - low).to(tl.int32) - offset


@triton.jit
def _codes(x, mask, grid):
    inverse, low, high, zero = grid
    return stored(tl.load(x, mask=mask).to(tl.float32) * inverse, low, high, zero)


@triton.jit
def rows(
    x, y, parameters, walk,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program (row tile, column tile)."""
    rows, length, splits = walk[0], row_length(walk, WIDE, VECTOR), walk[7]
    split, row = tl.program_id(0), tl.arange(0, ROWS)
    if not FLAT:
        row += split // splits * ROWS
        split %= splits
    first = (split.to(tl.int64) if WIDE else split) * COLUMNS
    grid = _grid(parameters)
    row = row.to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (first + column < length)
    source = pointers(x, row, first, walk, 0, CONTIGUOUS, VECTOR, COLUMNS)
    tl.store((y + first) + row * length + column, _codes(source, mask, grid), mask=mask)
    if REST:  # a constant  # noqa: SIM102
        if split == splits - 1:
            rest = length + tl.arange(0, VECTOR)
            mine = rest < walk[4][0]
            tl.store(y + rest, _codes(x + rest, mine, grid), mask=mine)


@triton.jit
def planes(
    x, y, parameters, walk,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, UNIT: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Program (image, pixel tile, channel tile)."""
    of_batch, of_channel, sizes, strides, pixels, channels = walk
    pixels = (tl.cast(pixels, tl.int64) if WIDE else pixels) * VECTOR
    channels *= UNIT
    across, down = tl.cdiv(channels, CHANNELS), tl.cdiv(pixels, PIXELS)
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    tile = tl.program_id(0) // across
    image = (tile // down).to(tl.int64)
    first = tile % down * PIXELS
    pixel = first + tl.arange(0, PIXELS)
    way = tl.arange(0, PIXELS)
    if CONTIGUOUS:
        x += first
    else:
        way = offsets(pixel, sizes, strides)
    grid = _grid(parameters)
    source = x + (image * of_batch + channel.to(tl.int64)[:, None] * of_channel) * VECTOR + way
    mask = (channel < channels)[:, None] & (pixel < pixels)
    codes = tl.trans(_codes(source, mask, grid))
    place = tl.arange(0, PIXELS).to(tl.int64)[:, None] * channels + channel
    mask = (pixel < pixels)[:, None] & (channel < channels)
    tl.store(y + (image * pixels + first) * channels + place, codes, mask=mask)

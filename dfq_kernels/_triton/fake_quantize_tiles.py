"""What the kernels of fake_quantize do with one tile; their arguments: fake_quantize_kernels.py."""

import triton
import triton.language as tl

from dfq_kernels._triton import arithmetic
from dfq_kernels._triton.layout import offsets


@triton.jit
def _grid_of(channel, mask, parameters):
    scale, scale_stride, zero_point, zero_point_stride, channels, quant_min, quant_max = parameters
    channel %= channels
    step = tl.load(scale + channel * scale_stride, mask=mask, other=1.0)
    zero = tl.load(zero_point + channel * zero_point_stride, mask=mask, other=0.0)
    return arithmetic.make_grid(step, zero, quant_min, quant_max)


@triton.jit
def row_grid(row, mask, parameters):
    inverse, scale, low, high = _grid_of(row, mask, parameters)
    return inverse[:, None], scale[:, None], low[:, None], high[:, None]


@triton.jit
def column_grid(column, mask, parameters):
    inverse, scale, low, high = _grid_of(column, mask, parameters)
    return inverse[None, :], scale[None, :], low[None, :], high[None, :]


@triton.jit
def _words(key, position, WORDS: tl.constexpr, SHAPE: tl.constexpr):
    """A word for each element of a tile, from the positions of every WORDS-th: all of a thread."""
    a, b, c, d = arithmetic.four_words(key, position >> 2)
    if WORDS == 4:
        word = tl.join(tl.join(a, c), tl.join(b, d))
    else:
        e, f, g, h = arithmetic.four_words(key, (position >> 2) + 1)
        even = tl.join(tl.join(a, e), tl.join(c, g))
        word = tl.join(even, tl.join(tl.join(b, f), tl.join(d, h)))
    return word.reshape(SHAPE)


@triton.jit
def _stays(drop, row, first, WORDS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a tile QDrop leaves alone; ``row`` [R, 1] is where the rows begin."""
    seed, largest = drop
    key = tl.load(seed)
    if WORDS == 1:
        position = row + first + tl.arange(0, COLUMNS)[None, :]
        a, b, c, d = arithmetic.four_words(key, position >> 2)
        even = tl.where((position & 2) == 0, a, c)
        odd = tl.where((position & 2) == 0, b, d)
        word = tl.where((position & 1) == 0, even, odd)
    else:
        every = WORDS * tl.arange(0, COLUMNS // WORDS)[None, :]
        word = _words(key, row + first + every, WORDS, (row.shape[0], COLUMNS))
    return word <= tl.cast(largest, tl.uint32)


@triton.jit
def forward_tile(x, y, mask, grid, drop, row, first, WORDS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile at the columns from ``first`` on of rows that begin at ``row`` in memory."""
    value = tl.load(x, mask=mask)
    result = arithmetic.fake_quantize(value.to(tl.float32), grid).to(value.dtype)
    if drop is not None:
        result = tl.where(_stays(drop, row, first, WORDS, COLUMNS), value, result)
    tl.store(y, result, mask=mask)


@triton.jit
def backward_tile(
    grad, x, dx, mask, grid, drop, row, first, WORDS: tl.constexpr, COLUMNS: tl.constexpr
):
    """As forward; ``dx`` may be None. Returns the terms of the two sums."""
    raw, value = tl.load(grad, mask=mask, other=0.0), tl.load(x, mask=mask, other=0.0)
    inside, for_scale, for_zero_point = arithmetic.fake_quantize_backward(
        raw.to(tl.float32), value.to(tl.float32), grid
    )
    if drop is not None:
        stays = _stays(drop, row, first, WORDS, COLUMNS)
        inside = inside | stays
        for_scale = tl.where(stays, 0.0, for_scale)
        for_zero_point = tl.where(stays, 0.0, for_zero_point)
    if dx is not None:
        tl.store(dx, tl.where(inside, raw, 0.0), mask=mask)
    return for_scale, for_zero_point


@triton.jit
def pointers(
    x, row, first, walk, index: tl.constexpr,
    CONTIGUOUS: tl.constexpr, VECTOR: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Pointers into input ``index`` at rows [R, 1] and the columns from ``first`` on."""
    _, row_sizes, row_strides, _, column_sizes, column_strides, _, _ = walk
    column = tl.arange(0, COLUMNS)
    if CONTIGUOUS:
        x += first
    else:
        column = offsets(first + column, column_sizes, column_strides[index])
    return x + offsets(row, row_sizes, row_strides[index]) * VECTOR + column[None, :]


@triton.jit
def row_length(walk, WIDE: tl.constexpr, VECTOR: tl.constexpr):
    """Columns of a row, without the rest."""
    return (tl.cast(walk[3], tl.int64) if WIDE else walk[3]) * VECTOR

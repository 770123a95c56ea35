"""The kernels of fake_quantize: tiles of rows and columns, see layout.py.

In the ``rows`` kernels the channel is the row, or there is only one; a program takes one tile,
backward several next to one another. In the ``columns`` kernels it follows from the column; a
program takes several tiles below one another, and makes the grid of its columns once.

Arguments that belong together come as a tuple:

    parameters   scale, its stride, zero_point, its stride, channels, quant_min, quant_max
    drop         seed, the largest word with which an element stays as it is; or None
    walk         row count, row sizes, row strides, whole vectors of a row, column sizes, column
                 strides (strides of each input), tiles of a program, programs in a line

Strides come in units of VECTOR elements, a constant that lets the compiler use wide loads. FLAT
means one row. Its length may be no multiple of VECTOR: then the last program also has a tile for
the REST.
WORDS is how many neighbours a thread holds, if the positions in memory at which tiles begin allow
to draw so many words at once: 4 or 8, else 1.
"""

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
def _row_grid(row, mask, parameters):
    inverse, scale, low, high = _grid_of(row, mask, parameters)
    return inverse[:, None], scale[:, None], low[:, None], high[:, None]


@triton.jit
def _column_grid(column, mask, parameters):
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
def _forward_tile(x, y, mask, grid, drop, row, first, WORDS: tl.constexpr, COLUMNS: tl.constexpr):
    """The tile at the columns from ``first`` on of rows that begin at ``row`` in memory."""
    value = tl.load(x, mask=mask)
    result = arithmetic.fake_quantize(value.to(tl.float32), grid).to(value.dtype)
    if drop is not None:
        result = tl.where(_stays(drop, row, first, WORDS, COLUMNS), value, result)
    tl.store(y, result, mask=mask)


@triton.jit
def _backward_tile(
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
def _input(
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
def rows_forward(
    x, y, parameters, drop, walk,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program (row tile, column tile)."""
    rows, length, splits = walk[0], walk[3] * VECTOR, walk[7]
    row, split = tl.arange(0, ROWS), tl.program_id(0)
    if not FLAT:
        row += split // splits * ROWS
        split %= splits
    first = (split.to(tl.int64) if WIDE else split) * COLUMNS
    grid = _row_grid(row, row < rows, parameters)
    row = row.to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (first + column < length)
    source = _input(x, row, first, walk, 0, CONTIGUOUS, VECTOR, COLUMNS)
    target = (y + first) + row * length + column
    _forward_tile(source, target, mask, grid, drop, row * length, first, WORDS, COLUMNS)
    if REST:  # a constant  # noqa: SIM102
        if split == splits - 1:
            rest = length + tl.arange(0, VECTOR)[None, :]
            mine = rest < walk[4][0]
            _forward_tile(x + rest, y + rest, mine, grid, drop, row * 0, length, WORDS, VECTOR)


@triton.jit
def columns_forward(
    x, y, parameters, drop, walk,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Program (split of the row tiles, column tile): its tiles below one another."""
    rows, length, tiles = walk[0], walk[3] * VECTOR, walk[6]
    across = tl.cdiv(length, COLUMNS)
    first = tl.program_id(0) % across * COLUMNS
    first = first.to(tl.int64) if WIDE else first
    column = first + tl.arange(0, COLUMNS)
    grid = _column_grid(column // RUN, column < length, parameters)
    begin = (tl.program_id(0) // across).to(tl.int64) * tiles * ROWS
    for tile in range(tiles):
        row = (begin + tile * ROWS + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (column < length)[None, :]
        source = _input(x, row, first, walk, 0, CONTIGUOUS, VECTOR, COLUMNS)
        target = (y + first) + row * length + tl.arange(0, COLUMNS)[None, :]
        _forward_tile(source, target, mask, grid, drop, row * length, first, WORDS, COLUMNS)


@triton.jit
def rows_backward(
    grad, x, dx, for_scale, for_zero_point, parameters, drop, walk,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program (row tile, split of the column tiles): tiles next to one another, and their sums.

    The sums go to [row // channels, split, row % channels].
    """
    rows, length, tiles, splits = walk[0], walk[3] * VECTOR, walk[6], walk[7]
    row, split = tl.arange(0, ROWS), tl.program_id(0)
    if not FLAT:
        row += split // splits * ROWS
        split %= splits
    grid = _row_grid(row, row < rows, parameters)
    row = row.to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    scale_terms = tl.zeros((ROWS, COLUMNS), tl.float32)
    zero_point_terms = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tiles):
        first = ((split.to(tl.int64) if WIDE else split) * tiles + tile) * COLUMNS
        upstream = _input(grad, row, first, walk, 0, CONTIGUOUS, VECTOR, COLUMNS)
        source = _input(x, row, first, walk, 1, CONTIGUOUS, VECTOR, COLUMNS)
        target = None
        if dx is not None:
            target = (dx + first) + row * length + column
        mask = (row < rows) & (first + column < length)
        more = _backward_tile(
            upstream, source, target, mask, grid, drop, row * length, first, WORDS, COLUMNS
        )
        scale_terms += more[0]
        zero_point_terms += more[1]
    scale_sums = tl.sum(scale_terms, 1, keep_dims=True)
    zero_point_sums = tl.sum(zero_point_terms, 1, keep_dims=True)
    if REST:  # a constant  # noqa: SIM102
        if split == splits - 1:
            rest = length + tl.arange(0, VECTOR)[None, :]
            mine = rest < walk[4][0]
            end = None
            if dx is not None:
                end = dx + rest
            last = _backward_tile(
                grad + rest, x + rest, end, mine, grid, drop, row * 0, length, WORDS, VECTOR
            )
            scale_sums += tl.sum(last[0], 1, keep_dims=True)
            zero_point_sums += tl.sum(last[1], 1, keep_dims=True)
    channels = parameters[4]
    place = (row // channels * splits + split) * channels + row % channels
    if for_scale is not None:
        tl.store(for_scale + place, scale_sums, mask=row < rows)
    if for_zero_point is not None:
        tl.store(for_zero_point + place, zero_point_sums, mask=row < rows)


@triton.jit
def columns_backward(
    grad, x, dx, for_scale, for_zero_point, parameters, drop, walk,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Program (split of the row tiles, column tile), as forward; sums go to [split, column]."""
    rows, length, tiles = walk[0], walk[3] * VECTOR, walk[6]
    across = tl.cdiv(length, COLUMNS)
    first = tl.program_id(0) % across * COLUMNS
    first = first.to(tl.int64) if WIDE else first
    column = first + tl.arange(0, COLUMNS)
    grid = _column_grid(column // RUN, column < length, parameters)
    split = (tl.program_id(0) // across).to(tl.int64)
    scale_terms = tl.zeros((ROWS, COLUMNS), tl.float32)
    zero_point_terms = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tiles):
        row = ((split * tiles + tile) * ROWS + tl.arange(0, ROWS))[:, None]
        upstream = _input(grad, row, first, walk, 0, CONTIGUOUS, VECTOR, COLUMNS)
        source = _input(x, row, first, walk, 1, CONTIGUOUS, VECTOR, COLUMNS)
        target = None
        if dx is not None:
            target = (dx + first) + row * length + tl.arange(0, COLUMNS)[None, :]
        mask = (row < rows) & (column < length)[None, :]
        more = _backward_tile(
            upstream, source, target, mask, grid, drop, row * length, first, WORDS, COLUMNS
        )
        scale_terms += more[0]
        zero_point_terms += more[1]
    place = split * length + column
    if for_scale is not None:
        tl.store(for_scale + place, tl.sum(scale_terms, 0), mask=column < length)
    if for_zero_point is not None:
        tl.store(for_zero_point + place, tl.sum(zero_point_terms, 0), mask=column < length)


@triton.jit
def finish_backward(
    for_scale, for_zero_point, scale, scale_stride, dscale, dzero_point, parts, channels,
    RUN: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sum [parts, channels, RUN] over parts and RUN in float64, in one order."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    if dscale is not None:
        total = _total(for_scale, channel, parts, channels, RUN, PARTS)
        tl.store(dscale + channel, total.to(tl.float32), mask=known)
    if dzero_point is not None:
        total = _total(for_zero_point, channel, parts, channels, RUN, PARTS)
        step = tl.load(scale + channel * scale_stride, mask=known, other=0.0)
        tl.store(dzero_point + channel, (-step.to(tl.float64) * total).to(tl.float32), mask=known)


@triton.jit
def _total(sums, channel, parts, channels, RUN: tl.constexpr, PARTS: tl.constexpr):
    total = tl.zeros((PARTS, channel.shape[0]), tl.float64)
    for first in range(0, parts * RUN, PARTS):
        index = (first + tl.arange(0, PARTS))[:, None]
        mask = (index < parts * RUN) & (channel < channels)[None, :]
        place = (index // RUN * channels + channel[None, :]) * RUN + index % RUN
        total += tl.load(sums + place, mask=mask, other=0.0)
    return tl.sum(total, 0)

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

from dfq_kernels._triton.fake_quantize_tiles import (
    backward_tile,
    column_grid,
    forward_tile,
    pointers,
    row_grid,
    row_length,
)


@triton.jit
def rows_forward(
    x, y, parameters, drop, walk,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program (row tile, column tile)."""
    rows_forward_program(
        tl.program_id(0), x, y, parameters, drop, walk,
        CONTIGUOUS, WIDE, VECTOR, WORDS, ROWS, COLUMNS, FLAT, REST,
    )  # fmt: skip


@triton.jit
def rows_forward_program(
    split, x, y, parameters, drop, walk,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    rows, length, splits = walk[0], row_length(walk, WIDE, VECTOR), walk[7]
    row = tl.arange(0, ROWS)
    if not FLAT:
        row += split // splits * ROWS
        split %= splits
    first = (split.to(tl.int64) if WIDE else split) * COLUMNS
    grid = row_grid(row, row < rows, parameters)
    row = row.to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < rows) & (first + column < length)
    source = pointers(x, row, first, walk, 0, CONTIGUOUS, VECTOR, COLUMNS)
    target = (y + first) + row * length + column
    forward_tile(source, target, mask, grid, drop, row * length, first, WORDS, COLUMNS)
    if REST:  # a constant  # noqa: SIM102
        if split == splits - 1:
            rest = length + tl.arange(0, VECTOR)[None, :]
            mine = rest < walk[4][0]
            forward_tile(x + rest, y + rest, mine, grid, drop, row * 0, length, WORDS, VECTOR)


@triton.jit
def columns_forward(
    x, y, parameters, drop, walk,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Program (split of the row tiles, column tile): its tiles below one another."""
    rows, length, tiles = walk[0], row_length(walk, WIDE, VECTOR), walk[6]
    across = tl.cdiv(length, COLUMNS)
    first = tl.program_id(0) % across * COLUMNS
    first = first.to(tl.int64) if WIDE else first
    column = first + tl.arange(0, COLUMNS)
    grid = column_grid(column // RUN, column < length, parameters)
    begin = (tl.program_id(0) // across).to(tl.int64) * tiles * ROWS
    for tile in range(tiles):
        row = (begin + tile * ROWS + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (column < length)[None, :]
        source = pointers(x, row, first, walk, 0, CONTIGUOUS, VECTOR, COLUMNS)
        target = (y + first) + row * length + tl.arange(0, COLUMNS)[None, :]
        forward_tile(source, target, mask, grid, drop, row * length, first, WORDS, COLUMNS)


@triton.jit
def rows_backward(
    grad, x, dx, for_scale, for_zero_point, parameters, drop, walk,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Program (row tile, split of the column tiles): tiles next to one another, and their sums.

    The sums go to [row // channels, split, row % channels].
    """
    rows_backward_program(
        tl.program_id(0), grad, x, dx, for_scale, for_zero_point, parameters, drop, walk,
        CONTIGUOUS, WIDE, VECTOR, WORDS, ROWS, COLUMNS, FLAT, REST,
    )  # fmt: skip


@triton.jit
def rows_backward_program(
    split, grad, x, dx, for_scale, for_zero_point, parameters, drop, walk,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    rows, length, tiles, splits = walk[0], row_length(walk, WIDE, VECTOR), walk[6], walk[7]
    row = tl.arange(0, ROWS)
    if not FLAT:
        row += split // splits * ROWS
        split %= splits
    grid = row_grid(row, row < rows, parameters)
    row = row.to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    scale_terms = tl.zeros((ROWS, COLUMNS), tl.float32)
    zero_point_terms = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tiles):
        first = ((split.to(tl.int64) if WIDE else split) * tiles + tile) * COLUMNS
        upstream = pointers(grad, row, first, walk, 0, CONTIGUOUS, VECTOR, COLUMNS)
        source = pointers(x, row, first, walk, 1, CONTIGUOUS, VECTOR, COLUMNS)
        target = None
        if dx is not None:
            target = (dx + first) + row * length + column
        mask = (row < rows) & (first + column < length)
        more = backward_tile(
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
            last = backward_tile(
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
    rows, length, tiles = walk[0], row_length(walk, WIDE, VECTOR), walk[6]
    across = tl.cdiv(length, COLUMNS)
    first = tl.program_id(0) % across * COLUMNS
    first = first.to(tl.int64) if WIDE else first
    column = first + tl.arange(0, COLUMNS)
    grid = column_grid(column // RUN, column < length, parameters)
    split = (tl.program_id(0) // across).to(tl.int64)
    scale_terms = tl.zeros((ROWS, COLUMNS), tl.float32)
    zero_point_terms = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tiles):
        row = ((split * tiles + tile) * ROWS + tl.arange(0, ROWS))[:, None]
        upstream = pointers(grad, row, first, walk, 0, CONTIGUOUS, VECTOR, COLUMNS)
        source = pointers(x, row, first, walk, 1, CONTIGUOUS, VECTOR, COLUMNS)
        target = None
        if dx is not None:
            target = (dx + first) + row * length + tl.arange(0, COLUMNS)[None, :]
        mask = (row < rows) & (column < length)[None, :]
        more = backward_tile(
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
    finish_program(
        tl.program_id(0), for_scale, for_zero_point, scale, scale_stride, dscale, dzero_point,
        parts, channels, RUN, PARTS, CHANNELS,
    )  # fmt: skip


@triton.jit
def finish_program(
    program, for_scale, for_zero_point, scale, scale_stride, dscale, dzero_point, parts, channels,
    RUN: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = program * CHANNELS + tl.arange(0, CHANNELS)
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

"""The kernels of fake_quantize_all: those of fake_quantize, each program for one of many tensors.

What belongs to a tensor comes as tuples with an entry for each. ``starts`` says at which program
each tensor begins; its programs do what those of fake_quantize do, in the same order.
"""

import triton
import triton.language as tl

from dfq_kernels._triton.fake_quantize_kernels import (
    finish_program,
    rows_backward_program,
    rows_forward_program,
)


@triton.jit
def _mine(values, starts):
    """The entry of this program's tensor."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(tl.program_id(0) >= starts[i], values[i], value)
    return value


@triton.jit
def _parameters(grids, starts):
    """As fake_quantize takes them: every stride is 1, and each row has its channel."""
    scales, zero_points, quant_mins, quant_maxs, channels = grids
    lists = _mine(channels, starts), _mine(quant_mins, starts), _mine(quant_maxs, starts)
    return _mine(scales, starts), 1, _mine(zero_points, starts), 1, lists[0], lists[1], lists[2]


@triton.jit
def _walk(walks, starts):
    """As fake_quantize takes it: dense rows, as long as they are apart."""
    rows, units, lengths, tiles, splits = walks
    row_count, unit = _mine(rows, starts), _mine(units, starts)
    length, tile, split = _mine(lengths, starts), _mine(tiles, starts), _mine(splits, starts)
    strides = (unit,), (unit,)
    return row_count, (row_count,), strides, unit, (length,), ((1,), (1,)), tile, split


@triton.jit
def rows_forward_all(
    starts, xs, ys, grids, walks,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Each program one tile of one tensor."""
    rows_forward_program(
        tl.program_id(0) - _mine(starts, starts), _mine(xs, starts), _mine(ys, starts),
        _parameters(grids, starts), None, _walk(walks, starts),
        CONTIGUOUS, WIDE, VECTOR, WORDS, ROWS, COLUMNS, FLAT, REST,
    )  # fmt: skip


@triton.jit
def rows_backward_all(
    starts, grads, xs, dxs, for_scale, for_zero_point, places, grids, walks,
    CONTIGUOUS: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, WORDS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Each program some tiles of one tensor; its sums begin at its place in the two for all."""
    dx = None
    if dxs is not None:
        dx = _mine(dxs, starts)
    place = _mine(places, starts)
    if for_scale is not None:
        for_scale += place
    if for_zero_point is not None:
        for_zero_point += place
    rows_backward_program(
        tl.program_id(0) - _mine(starts, starts), _mine(grads, starts), _mine(xs, starts), dx,
        for_scale, for_zero_point, _parameters(grids, starts), None, _walk(walks, starts),
        CONTIGUOUS, WIDE, VECTOR, WORDS, ROWS, COLUMNS, FLAT, REST,
    )  # fmt: skip


@triton.jit
def finish_backward_all(
    starts, for_scale, for_zero_point, places, scales, dscales, dzero_points, parts, channels,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The second stage, each program for some channels of one tensor."""
    place = _mine(places, starts)
    dscale, dzero_point = None, None
    if dscales is not None:
        for_scale += place
        dscale = _mine(dscales, starts)
    if dzero_points is not None:
        for_zero_point += place
        dzero_point = _mine(dzero_points, starts)
    finish_program(
        tl.program_id(0) - _mine(starts, starts), for_scale, for_zero_point,
        _mine(scales, starts), 1, dscale, dzero_point,
        _mine(parts, starts), _mine(channels, starts), 1, PARTS, CHANNELS,
    )  # fmt: skip

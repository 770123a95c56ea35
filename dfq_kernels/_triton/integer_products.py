"""What the kernels of integer layers share: the order of the tiles, and of the slices of K."""

import triton
import triton.language as tl

ROWS_TOGETHER = tl.constexpr(8)  # tiles of pixels that share the weights in the L2 cache


@triton.jit
def program(rows, columns, TOGETHER: tl.constexpr):
    """The row and column of the tile that this program computes."""
    index = tl.program_id(0)
    group = index // (TOGETHER * columns)
    height = tl.minimum(rows - group * TOGETHER, TOGETHER)
    rest = index % (TOGETHER * columns)
    return group * TOGETHER + rest % height, rest // height


@triton.jit
def next_slice(start, tap, tap_row, tap_column, inputs, KERNEL: tl.constexpr):
    """Counts taps from the next ``start`` within one: a division takes a dozen instructions."""
    if KERNEL[0] * KERNEL[1] > 1:
        ends = start >= inputs
        start = tl.where(ends, 0, start)
        tap += ends.to(tl.int32)
        tap_column += ends.to(tl.int32)
        wraps = tap_column == KERNEL[1]
        tap_column = tl.where(wraps, 0, tap_column)
        tap_row += wraps.to(tl.int32)
    return start, tap, tap_row, tap_column


@triton.jit
def dot(x, w, sums, SWAP: tl.constexpr):
    """``sums + x @ w.T``, or transposed: [outputs, pixels]."""
    if SWAP:
        sums = tl.dot(w, tl.trans(x), sums, out_dtype=tl.int32)
    else:
        sums = tl.dot(x, tl.trans(w), sums, out_dtype=tl.int32)
    return sums

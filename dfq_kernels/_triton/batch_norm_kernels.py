"""Kernels of batch_norm that read or write tensors like x.

x is walked as a matrix whose columns belong to one channel each; see batch_norm_tiles. A program
takes ``iterations`` tiles of [HEIGHT, WIDTH] elements below one another, and the next ones are on
their way while it works on one. Threads keep sums of their own and add them up once, at the end,
so there is no barrier in the loop.
"""

import triton
import triton.language as tl

from dfq_kernels._triton.batch_norm_channels import MEAN, SHIFT

_STEPS = tl.constexpr(8)  # tiles are summed so many at a time: less is rounded off
_SIZES = ["rows", "column_units", "channels", "splits", "iterations"]  # one kernel for all


@triton.jit
def _program(
    rows,
    columns,
    iterations,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The program's split of the rows, its columns, its first row, and what confines its tiles."""
    blocks = tl.cdiv(columns, WIDTH)
    split = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    column = block * WIDTH + tl.arange(0, WIDTH)
    if WIDE:
        split = split.to(tl.int64)
        block = block.to(tl.int64)
    top = split * iterations * HEIGHT
    end = tl.minimum(top + iterations * HEIGHT, rows)
    return split, column, top, (end, block, column < columns)


@triton.jit
def _tile(
    tensor_ptr,
    top,
    limits,  # the last of _program
    sizes,  # of the dimensions that number the rows, fastest first, without the slowest
    column_stride,
    strides,  # of a block of columns and of those dimensions, in units
    UNIT: tl.constexpr,
    HEIGHT: tl.constexpr,
):
    """Addresses of the tile that begins at row ``top``, and which of them are the program's."""
    end, block, inside = limits
    row = top + tl.arange(0, HEIGHT)
    mask = (row < end)[:, None] & inside[None, :]
    units = row * 0 + block * strides[0]
    for d in tl.static_range(len(sizes)):
        slower = row // sizes[d]
        units += (row - slower * sizes[d]) * strides[1 + d]
        row = slower
    units += row * strides[1 + len(sizes)]
    column = tl.arange(0, inside.shape[0])
    return tensor_ptr + (units[:, None] * UNIT + column[None, :] * column_stride), mask


@triton.jit
def _table_rows(table_ptr, first: tl.constexpr, channels, channel, mask):
    """Three of them, each [1, WIDTH]."""
    at = table_ptr + first * channels + channel
    a = tl.load(at, mask=mask, other=0.0)
    b = tl.load(at + channels, mask=mask, other=0.0)
    c = tl.load(at + 2 * channels, mask=mask, other=0.0)
    return a[None, :], b[None, :], c[None, :]


@triton.jit
def _mean(x, rows, SHORT: tl.constexpr):
    """Of each column of a tile of so many rows."""
    mean = tl.sum(x.to(tl.float32), 0) / rows
    if SHORT:
        # As short as x: then x - mean is exact. Its rounding would be the same for equal x, of
        # which there are many, and would not average out.
        mean = (mean.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return mean


@triton.jit
def _total(sums):
    """Of each column: over threads in float64, or that would be the largest error of all."""
    return tl.sum(sums.to(tl.float64), 0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    x_ptr,
    y_ptr,  # like x, or None
    table_ptr,  # [TABLE_ROWS, channels], or None
    partials_ptr,  # [3, splits, columns], float32
    rows,
    column_units,
    channels,
    run,
    splits,
    iterations,
    sizes,
    x_column,
    x_strides,
    y_column,  # like x's where y is None
    y_strides,
    RELU: tl.constexpr,
    UNIT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """y; and of each column of a split a guess k of its mean, and sums of x - k and (x - k)^2.

    k is the mean of the split's first tile. Whatever x is, the sums are then as good as with the
    mean itself but for a factor of at most 1 + iterations, as that tile is in them.
    """
    columns = column_units * UNIT
    split, column, top, limits = _program(rows, columns, iterations, HEIGHT, WIDTH, WIDE)
    end, inside = limits[0], limits[2]
    if y_ptr is not None:
        shift, scale, bias = _table_rows(table_ptr, SHIFT, channels, column // run, inside)
    at, mask = _tile(x_ptr, top, limits, sizes, x_column, x_strides, UNIT, HEIGHT)
    x = tl.load(at, mask=mask, other=0.0)
    at, mask = _tile(x_ptr, top + HEIGHT, limits, sizes, x_column, x_strides, UNIT, HEIGHT)
    x_next = tl.load(at, mask=mask, other=0.0)
    k = _mean(x, tl.minimum(end - top, HEIGHT).to(tl.float32), x.dtype != tl.float32)
    sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
    squares = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for begin in range(0, iterations, _STEPS):
        step_sums = tl.zeros((HEIGHT, WIDTH), tl.float32)
        step_squares = tl.zeros((HEIGHT, WIDTH), tl.float32)
        for _ in range(tl.minimum(iterations - begin, _STEPS)):
            ahead = top + 2 * HEIGHT
            at, mask = _tile(x_ptr, ahead, limits, sizes, x_column, x_strides, UNIT, HEIGHT)
            x_ahead = tl.load(at, mask=mask, other=0.0)
            out_ptr = x_ptr if y_ptr is None else y_ptr
            at, mask = _tile(out_ptr, top, limits, sizes, y_column, y_strides, UNIT, HEIGHT)
            value = x.to(tl.float32)
            d = tl.where(mask, value - k[None, :], 0.0)
            step_sums += d
            step_squares += d * d
            if y_ptr is not None:
                y = (value - shift) * scale + bias
                if RELU:
                    y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
                tl.store(at, y.to(y_ptr.dtype.element_ty), mask=mask)
            x = x_next
            x_next = x_ahead
            top += HEIGHT
        sums += step_sums
        squares += step_squares

    at = partials_ptr + split.to(tl.int64) * columns + column
    between = tl.cast(splits, tl.int64) * columns
    tl.store(at, k, mask=inside)
    tl.store(at + between, _total(sums), mask=inside)
    tl.store(at + 2 * between, _total(squares), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    x_ptr,  # or None where no gradient depends on it
    grad_y_ptr,  # like x, or None for zeros
    grad_x_ptr,  # like x
    table_ptr,  # [TABLE_ROWS, channels]
    partials_ptr,  # [2, splits, columns], float32, or None
    rows,
    column_units,
    channels,
    run,
    splits,
    iterations,
    sizes,
    x_column,
    x_strides,
    grad_y_column,
    grad_y_strides,
    grad_x_column,
    grad_x_strides,
    RELU: tl.constexpr,
    OF_STATISTICS: tl.constexpr,
    UNIT: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """grad_x; and of each column of a split the sums of g * (x - shift) and of g."""
    columns = column_units * UNIT
    split, column, top, limits = _program(rows, columns, iterations, HEIGHT, WIDTH, WIDE)
    inside = limits[2]
    if grad_y_ptr is not None:
        shift, scale, bias = _table_rows(table_ptr, SHIFT, channels, column // run, inside)
    if OF_STATISTICS:
        mean, offset, slope = _table_rows(table_ptr, MEAN, channels, column // run, inside)
    x = tl.zeros((HEIGHT, WIDTH), grad_x_ptr.dtype.element_ty)
    g = x
    if x_ptr is not None:
        at, mask = _tile(x_ptr, top, limits, sizes, x_column, x_strides, UNIT, HEIGHT)
        x = tl.load(at, mask=mask, other=0.0)
    if grad_y_ptr is not None:
        at, mask = _tile(
            grad_y_ptr, top, limits, sizes, grad_y_column, grad_y_strides, UNIT, HEIGHT
        )
        g = tl.load(at, mask=mask, other=0.0)
    of_weight = tl.zeros((HEIGHT, WIDTH), tl.float32)
    of_bias = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for begin in range(0, iterations, _STEPS):
        step_of_weight = tl.zeros((HEIGHT, WIDTH), tl.float32)
        step_of_bias = tl.zeros((HEIGHT, WIDTH), tl.float32)
        for _ in range(tl.minimum(iterations - begin, _STEPS)):
            ahead = top + HEIGHT
            x_ahead = x
            g_ahead = g
            if x_ptr is not None:
                at, mask = _tile(x_ptr, ahead, limits, sizes, x_column, x_strides, UNIT, HEIGHT)
                x_ahead = tl.load(at, mask=mask, other=0.0)
            if grad_y_ptr is not None:
                at, mask = _tile(
                    grad_y_ptr, ahead, limits, sizes, grad_y_column, grad_y_strides, UNIT, HEIGHT
                )
                g_ahead = tl.load(at, mask=mask, other=0.0)
            value = x.to(tl.float32)
            grad_x = tl.zeros((HEIGHT, WIDTH), tl.float32)
            if grad_y_ptr is not None:
                gradient = g.to(tl.float32)
                centered = value - shift
                if RELU:
                    gradient = tl.where(centered * scale + bias > 0, gradient, 0.0)
                grad_x = gradient * scale
                if partials_ptr is not None:
                    step_of_weight += gradient * centered
                    step_of_bias += gradient
            if OF_STATISTICS:
                of_statistics = offset + slope * (value - mean)
                grad_x = of_statistics if grad_y_ptr is None else grad_x + of_statistics
            at, mask = _tile(
                grad_x_ptr, top, limits, sizes, grad_x_column, grad_x_strides, UNIT, HEIGHT
            )
            tl.store(at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
            x = x_ahead
            g = g_ahead
            top += HEIGHT
        of_weight += step_of_weight
        of_bias += step_of_bias

    if partials_ptr is not None:
        at = partials_ptr + split.to(tl.int64) * columns + column
        between = tl.cast(splits, tl.int64) * columns
        tl.store(at, _total(of_weight), mask=inside)
        tl.store(at + between, _total(of_bias), mask=inside)

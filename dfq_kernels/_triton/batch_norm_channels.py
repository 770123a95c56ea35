"""Kernels of batch_norm with a few values of each channel: before x is read, and after."""

import triton
import triton.language as tl

# Rows of the table that table_kernel writes.
SHIFT = tl.constexpr(0)
SCALE = tl.constexpr(1)
BIAS = tl.constexpr(2)
INVERSE = tl.constexpr(3)
MEAN = tl.constexpr(4)
OFFSET = tl.constexpr(5)
SLOPE = tl.constexpr(6)
TABLE_ROWS = 7

CHANNELS = tl.constexpr(8)  # whose partial sums a program merges,
_ENTRIES = tl.constexpr(256)  # so many of each at once


@triton.jit
def _channel_values(values_ptr, stride, channel, mask, otherwise: tl.constexpr):
    if values_ptr is None:
        return tl.full(channel.shape, otherwise, tl.float32)
    return tl.load(values_ptr + channel.to(tl.int64) * stride, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["channels"])
def table_kernel(
    table_ptr,  # [TABLE_ROWS, C], float32
    running_mean_ptr,  # [C] like all that follow, float32, or None
    running_var_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    grad_mean_ptr,
    grad_var_ptr,
    strides,  # of those seven
    channels,
    count,  # elements of a channel, as float32
    EPS: tl.constexpr,  # an argument would be rounded to float32
    WIDTH: tl.constexpr,
):
    """What the elements of each channel are multiplied by and added to."""
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    mask = channel < channels
    at = table_ptr + channel
    if running_mean_ptr is not None:
        shift = _channel_values(running_mean_ptr, strides[0], channel, mask, 0.0)
        var = _channel_values(running_var_ptr, strides[1], channel, mask, 0.0)
        weight = _channel_values(weight_ptr, strides[2], channel, mask, 1.0)
        # -0 for no bias: adding it changes nothing, not even the sign of 0
        bias = _channel_values(bias_ptr, strides[3], channel, mask, -0.0)
        inverse = (1.0 / tl.sqrt(var.to(tl.float64) + EPS)).to(tl.float32)
        tl.store(at + SHIFT * channels, shift, mask=mask)
        tl.store(at + SCALE * channels, inverse * weight, mask=mask)
        tl.store(at + BIAS * channels, bias, mask=mask)
        tl.store(at + INVERSE * channels, inverse, mask=mask)
    if mean_ptr is not None:
        mean = _channel_values(mean_ptr, strides[4], channel, mask, 0.0)
        grad_mean = _channel_values(grad_mean_ptr, strides[5], channel, mask, 0.0)
        grad_var = _channel_values(grad_var_ptr, strides[6], channel, mask, 0.0)
        elements = tl.full(channel.shape, count, tl.float32)
        tl.store(at + MEAN * channels, mean, mask=mask)
        tl.store(at + OFFSET * channels, tl.div_rn(grad_mean, elements), mask=mask)
        tl.store(at + SLOPE * channels, tl.div_rn(grad_var * 2, elements), mask=mask)


@triton.jit
def _entries(first, columns, channel, channels, run, splits):
    """Of some partial sums of some channels: their places, which of them are, and their splits."""
    entry = first + tl.arange(0, _ENTRIES)
    split = entry // run
    column = channel[None, :] * run + (entry - split * run)[:, None]
    mask = (entry < splits * run)[:, None] & (channel < channels)[None, :]
    return split[:, None].to(tl.int64) * columns + column, mask, split[:, None]


@triton.jit(do_not_specialize=["rows", "split_rows", "channels", "splits"])
def merge_statistics_kernel(
    partials_ptr,  # [3, splits, channels * run]: k and sums of x - k and (x - k)^2
    mean_ptr,  # [channels]
    var_ptr,  # [channels]
    rows,
    split_rows,  # of all splits but the last
    channels,
    run,
    splits,
):
    """Mean and variance, in float64 and in deviations from the first k."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channel < channels
    columns = tl.cast(channels, tl.int64) * run
    origin = tl.load(partials_ptr + channel * run, mask=in_channels, other=0.0).to(tl.float64)
    last_rows = rows - (splits - 1) * split_rows
    sums = tl.zeros((_ENTRIES, CHANNELS), tl.float64)
    squares = tl.zeros((_ENTRIES, CHANNELS), tl.float64)
    for first in range(0, splits * run, _ENTRIES):
        at, mask, split = _entries(first, columns, channel, channels, run, splits)
        at = partials_ptr + at
        k = tl.load(at, mask=mask, other=0.0).to(tl.float64)
        s = tl.load(at + splits * columns, mask=mask, other=0.0).to(tl.float64)
        q = tl.load(at + 2 * splits * columns, mask=mask, other=0.0).to(tl.float64)
        n = tl.where(split < splits - 1, split_rows, last_rows).to(tl.float64)
        rest = s / n
        d = k - origin[None, :] + rest
        sums += tl.where(mask, n * d, 0.0)
        squares += tl.where(mask, q - s * rest + n * d * d, 0.0)
    count = tl.cast(rows, tl.float64) * run
    d = tl.sum(sums, 0) / count
    var = tl.sum(squares, 0) / count - d * d
    tl.store(mean_ptr + channel, (origin + d).to(tl.float32), mask=in_channels)
    var = tl.where(var < 0, 0.0, var)  # NaN stays
    tl.store(var_ptr + channel, var.to(tl.float32), mask=in_channels)


@triton.jit(do_not_specialize=["channels", "splits"])
def merge_gradients_kernel(
    partials_ptr,  # [2, splits, channels * run]: sums of g * (x - shift) and of g
    table_ptr,  # [TABLE_ROWS, channels]
    grad_weight_ptr,  # [channels]
    grad_bias_ptr,  # [channels]
    channels,
    run,
    splits,
):
    """Gradients of weight and bias, summed in float64."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    in_channels = channel < channels
    columns = tl.cast(channels, tl.int64) * run
    of_weight = tl.zeros((_ENTRIES, CHANNELS), tl.float64)
    of_bias = tl.zeros((_ENTRIES, CHANNELS), tl.float64)
    for first in range(0, splits * run, _ENTRIES):
        at, mask, _ = _entries(first, columns, channel, channels, run, splits)
        at = partials_ptr + at
        of_weight += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        of_bias += tl.load(at + splits * columns, mask=mask, other=0.0).to(tl.float64)
    inverse = tl.load(table_ptr + INVERSE * channels + channel, mask=in_channels, other=0.0)
    weighted = tl.sum(of_weight, 0) * inverse.to(tl.float64)
    tl.store(grad_weight_ptr + channel, weighted.to(tl.float32), mask=in_channels)
    tl.store(grad_bias_ptr + channel, tl.sum(of_bias, 0).to(tl.float32), mask=in_channels)

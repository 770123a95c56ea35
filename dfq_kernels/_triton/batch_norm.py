"""batch_norm in Triton: x is read once forward and once backward, whatever its strides.

Three launches each way: a table of the channels' values, the pass over x, and the merging of what
its programs summed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from dfq_kernels._triton.batch_norm_channels import (
    CHANNELS,
    TABLE_ROWS,
    merge_gradients_kernel,
    merge_statistics_kernel,
    table_kernel,
)
from dfq_kernels._triton.batch_norm_kernels import backward_kernel, forward_kernel
from dfq_kernels._triton.batch_norm_tiles import WARPS, Tiling, tile
from dfq_kernels._triton.launch import launch

_TABLE_WIDTH = 128
_MERGE_WARPS = 8


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``dfq_kernels.batch_norm.batch_norm_reference``."""
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y, *_of_nothing(x)
    tiling = tile(x, y)
    table = _table(x, tiling, (running_mean, running_var, weight, bias, None, None, None), eps)
    return y, *_measure(x, tiling, y, table, relu)


def batch_norm_statistics(x: Tensor, running_mean: Tensor) -> tuple[Tensor, Tensor]:
    """See ``dfq_kernels.batch_norm.batch_norm_statistics_reference``."""
    if x.numel() == 0:
        return _of_nothing(x)
    return _measure(x, tile(x), None, None, False)


def batch_norm_backward(
    grad_y: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    x: Tensor,
    mean: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
    learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``dfq_kernels.batch_norm.batch_norm_backward_reference``."""
    grad_x = torch.empty_like(x)
    learned = x.shape[1] if learns else 0
    if x.numel() == 0:
        zeros = x.new_zeros(learned, dtype=torch.float32)
        return grad_x, zeros, zeros.clone()
    of_statistics = grad_mean is not None or grad_var is not None
    values = (running_mean, running_var, weight, bias)
    values += (mean, grad_mean, grad_var) if of_statistics else (None, None, None)
    tensors = (x if relu or learns or of_statistics else None, grad_y, grad_x)
    tiling = tile(x, grad_y, grad_x)
    grad_weight, grad_bias = (x.new_empty(learned, dtype=torch.float32) for _ in range(2))
    table = _table(x, tiling, values, eps)
    partials = _partials(x, tiling, 2) if learns else None
    _differentiate(tensors, tiling, table, partials, relu, of_statistics)
    if partials is not None:
        _merge(merge_gradients_kernel, partials, table, grad_weight, grad_bias, tiling=tiling)
    return grad_x, grad_weight, grad_bias


def batch_norm_statistics_backward(
    grad_mean: Tensor | None, grad_var: Tensor | None, x: Tensor, mean: Tensor
) -> Tensor:
    """See ``dfq_kernels.batch_norm.batch_norm_statistics_backward_reference``."""
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x
    tiling = tile(x, x, grad_x)
    table = _table(x, tiling, (None, None, None, None, mean, grad_mean, grad_var), 0.0)
    _differentiate((x, None, grad_x), tiling, table, None, False, True)
    return grad_x


def _of_nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.new_full(x.shape[1:2], torch.nan, dtype=torch.float32)
    return mean, mean.clone()


def _table(x: Tensor, tiling: Tiling, values: tuple[Tensor | None, ...], eps: float) -> Tensor:
    """The channels' values, from the seven tensors of ``table_kernel``."""
    table = x.new_empty(TABLE_ROWS, tiling.channels, dtype=torch.float32)
    strides = tuple(0 if value is None else value.stride(0) for value in values)
    programs = triton.cdiv(tiling.channels, _TABLE_WIDTH)
    args = (table, *values, strides, tiling.channels, float(tiling.count))
    launch(table_kernel, programs, x, *args, EPS=eps, WIDTH=_TABLE_WIDTH, num_warps=WARPS)
    return table


def _measure(
    x: Tensor, tiling: Tiling, y: Tensor | None, table: Tensor | None, relu: bool
) -> tuple[Tensor, Tensor]:
    """Mean and variance of x and, if there is a y to be filled, y."""
    partials = _partials(x, tiling, 3)
    strides = (*_strides(tiling, 0), *_strides(tiling, -1))
    args = (x, y, table, partials, *_walk(tiling), *strides)
    launch(forward_kernel, tiling.programs, x, *args, RELU=relu, **_constants(tiling))
    mean, var = (x.new_empty(tiling.channels, dtype=torch.float32) for _ in range(2))
    rows = (tiling.rows, tiling.height * tiling.iterations)
    _merge(merge_statistics_kernel, partials, mean, var, *rows, tiling=tiling)
    return mean, var


def _differentiate(
    tensors: tuple[Tensor | None, Tensor | None, Tensor],
    tiling: Tiling,
    table: Tensor,
    partials: Tensor | None,
    relu: bool,
    of_statistics: bool,
) -> None:
    """Fill grad_x, the last of x, grad_y and grad_x; and ``partials``, if there are any."""
    strides = (value for i in range(len(tensors)) for value in _strides(tiling, i))
    args = (*tensors, table, partials, *_walk(tiling), *strides)
    flags = {"RELU": relu, "OF_STATISTICS": of_statistics}
    launch(backward_kernel, tiling.programs, table, *args, **flags, **_constants(tiling))


def _partials(x: Tensor, tiling: Tiling, sums: int) -> Tensor:
    return x.new_empty(sums, tiling.splits, tiling.columns, dtype=torch.float32)


def _merge(kernel: Any, partials: Tensor, *args: Any, tiling: Tiling) -> None:
    args += (tiling.channels, tiling.run, tiling.splits)
    programs = triton.cdiv(tiling.channels, CHANNELS.value)
    launch(kernel, programs, partials, partials, *args, num_warps=_MERGE_WARPS)


def _walk(tiling: Tiling) -> tuple[int | tuple[int, ...], ...]:
    return (
        tiling.rows,
        tiling.columns // tiling.unit,
        tiling.channels,
        tiling.run,
        tiling.splits,
        tiling.iterations,
        tiling.sizes,
    )


def _strides(tiling: Tiling, tensor: int) -> tuple[int, tuple[int, ...]]:
    return tiling.column_strides[tensor], tiling.strides[tensor]


def _constants(tiling: Tiling) -> dict[str, int]:
    return {
        "UNIT": tiling.unit,
        "HEIGHT": tiling.height,
        "WIDTH": tiling.width,
        "WIDE": tiling.wide,
        "num_warps": WARPS,
    }

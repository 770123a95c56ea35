"""qconv2d in Triton; a group for each channel of x has kernels of its own."""

from __future__ import annotations

from torch import Tensor

from dfq_kernels._triton.depthwise import depthwise
from dfq_kernels._triton.integer_epilogue import empty_images
from dfq_kernels._triton.integer_layer import run_layer
from dfq_kernels._triton.integer_plan import Layer
from dfq_kernels.integer import output_of
from dfq_kernels.packing import channels_of


def qconv2d(
    x: Tensor,
    weight: Tensor,
    weight_zero: Tensor | None,
    prepacked: Tensor | None,
    x_zero: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    multiplier: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_multiplier: float,
    residual_zero: int,
    relu: bool,
    grid: list[int],
) -> Tensor:
    """See ``dfq_kernels.qconv2d.qconv2d_reference``."""
    if groups == x.shape[1] > 1:
        window = (kernel_size, stride, padding, dilation, groups)
        rest = (multiplier, bias, residual, residual_multiplier, residual_zero, relu, grid)
        return depthwise(x, weight, weight_zero, prepacked, x_zero, *window, *rest)
    batch, _, *size = x.shape
    window = (kernel_size, stride, padding, dilation)
    out_size = [_output_size(n, *sides) for n, *sides in zip(size, *window, strict=True)]
    outputs = multiplier.shape[0]
    stored, dtype = output_of(outputs, grid)
    y = empty_images(x, (batch, stored, *out_size), dtype)
    pairs = [(int(pair[0]), int(pair[1])) for pair in (size, out_size, *window)]
    layer = Layer(batch, pairs[0], channels_of(x, 1), pairs[1], outputs, *pairs[2:], groups=groups)
    rest = (multiplier, bias, residual, residual_multiplier, residual_zero, relu, grid)
    run_layer(layer, (x, weight, weight_zero), x_zero, y, rest)
    return y


def _output_size(n: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1

"""qlinear in Triton: a convolution of images of one pixel."""

from __future__ import annotations

from torch import Tensor

from dfq_kernels._triton.integer_layer import run_layer
from dfq_kernels._triton.integer_plan import Layer
from dfq_kernels.integer import output_of
from dfq_kernels.packing import channels_of


def qlinear(
    x: Tensor,
    weight: Tensor,
    weight_zero: Tensor | None,
    prepacked: Tensor | None,
    x_zero: int,
    multiplier: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_multiplier: float,
    residual_zero: int,
    relu: bool,
    grid: list[int],
) -> Tensor:
    """See ``dfq_kernels.qlinear.qlinear_reference``."""
    outputs = multiplier.shape[0]
    stored, dtype = output_of(outputs, grid)
    y = x.new_empty((*x.shape[:-1], stored), dtype=dtype)
    layer = Layer(y.numel() // max(1, stored), (1, 1), channels_of(x, -1), (1, 1), outputs)
    rest = (multiplier, bias, residual, residual_multiplier, residual_zero, relu, grid)
    run_layer(layer, (x, weight, weight_zero), x_zero, y, rest)
    return y

"""A linear layer of integers, with everything up to the next layer's integers in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfq_kernels import _backend
from dfq_kernels.integer import (
    Epilogue,
    IntegerWeight,
    check,
    check_residual,
    finish,
    integers,
    output_of,
)
from dfq_kernels.packing import channels_of, check_packed, unpack_channels


def qlinear(x: Tensor, weight: IntegerWeight, epilogue: Epilogue, *, x_zero: int = 0) -> Tensor:
    """Multiply ``x - x_zero`` by the integers of ``weight``, and let ``epilogue`` finish it.

    The sums are exact, in int32. There is no gradient.

    Args:
        x: [..., K], int8, contiguous; or [..., K / 2], uint8, by ``pack_channels``.
        weight: of shape [O, K]; ``prepack`` it once, for the CPU.
        epilogue: scale, bias, residual, ReLU, and the grid of the output.
        x_zero: what stands for real zero in ``x``.

    Returns:
        [..., O], contiguous; int8 if ``epilogue`` has a grid, else float32. Packed: [..., O / 2].

    Raises:
        ValueError: if an argument is not as described, or sums could leave int32.
    """
    check(x, weight, epilogue, x_zero)
    if x.ndim == 0 or len(weight.shape) != 2 or channels_of(x, -1) != weight.shape[1]:
        raise ValueError(
            f"x must be [..., K] and weights [O, K], got {list(x.shape)} and {list(weight.shape)}."
        )
    if not x.is_contiguous():
        raise ValueError(f"x must be contiguous, got strides {x.stride()}; call .contiguous().")
    if x.dtype == torch.uint8:
        check_packed("x", channels_of(x, -1))
    if epilogue.grid is not None and epilogue.grid.packed:
        check_packed("the output", weight.shape[0])
    check_residual(epilogue.residual, (*x.shape[:-1], weight.shape[0]), -1)
    if epilogue.residual is not None and not epilogue.residual.values.is_contiguous():
        raise ValueError("the residual must be contiguous; call .contiguous() on it.")
    tensors = (x, weight.values, weight.zero, weight.prepacked)
    args = (*tensors, x_zero, *epilogue.arguments())
    # a small layer is done before the dispatcher has found its way through Python
    direct = type(x) is Tensor and not torch.compiler.is_compiling()
    return _run(*args) if direct else _qlinear(*args)


def qlinear_reference(
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
    """The definition that every other implementation must match, bit for bit."""
    x = unpack_channels(x, -1)
    whole = integers(weight, weight_zero, [multiplier.shape[0], x.shape[-1]])
    # float64 holds every sum, and every part of one, exactly
    sums = (x.double() - x_zero) @ whole.double().T
    rest = (residual_multiplier, residual_zero, relu, grid)
    y = finish(sums, multiplier, bias, residual, *rest)
    return torch.empty(y.shape, dtype=y.dtype, device=y.device).copy_(y)


_qlinear = torch.library.custom_op("dfq::qlinear", qlinear_reference, mutates_args=())


def _run(x: Tensor, *args: Any) -> Tensor:
    return _backend.implementation("qlinear", x.device.type)(x, *args)


for _device in ("cpu", "cuda"):
    _qlinear.register_kernel(_device)(_run)


@_qlinear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_zero: Tensor | None,
    prepacked: Tensor | None,
    x_zero: int,
    multiplier: Tensor,
    *rest: Any,
) -> Tensor:
    size, dtype = output_of(multiplier.shape[0], rest[-1])
    return x.new_empty((*x.shape[:-1], size), dtype=dtype)

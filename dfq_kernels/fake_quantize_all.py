"""fake_quantize of many tensors in one call: all weights of a model, each too small to be alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dfq_kernels import _backend, _eager
from dfq_kernels.fake_quantize import (
    check_bounds,
    check_grid,
    fake_quantize_backward_reference,
    fake_quantize_reference,
)


def fake_quantize_all(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    quant_mins: Sequence[int],
    quant_maxs: Sequence[int],
) -> list[Tensor]:
    """``fake_quantize(x, scale, zero_point, quant_min, quant_max)`` for each of many tensors.

    With one scale for each index of dimension 0, or one for all. Values and gradients are those of
    ``fake_quantize``, bit for bit; what is saved is the way into the op and, on a GPU, the launch
    of a kernel for each tensor.

    Args:
        xs: float32, float16 or bfloat16; contiguous or channels_last, as the weights of layers
            are, so that each index of dimension 0 is a row of neighbours.
        scales: for each x [1] or [x.shape[0]]; float32, positive.
        zero_points: as ``scales``; beyond ±2**20 they count as ±2**20.
        quant_mins: smallest codes, at least -2**20.
        quant_maxs: largest codes, at most 2**20.

    Returns:
        As ``xs``: shapes, dtypes and strides.

    Raises:
        ValueError: if the lists differ in length, or an argument is not as described.
    """
    lengths = [len(values) for values in (xs, scales, zero_points, quant_mins, quant_maxs)]
    if len(set(lengths)) != 1:
        raise ValueError(f"the five lists must be equally long, got lengths {lengths}.")
    if not xs:
        return []
    for x, scale, zero_point in zip(xs, scales, zero_points, strict=True):
        _check_rows(x)
        check_grid(x, scale, zero_point, _axis(scale))
    for low, high in zip(quant_mins, quant_maxs, strict=True):
        check_bounds(low, high)
    tensors = [*xs, *scales, *zero_points]
    lists = list(xs), list(scales), list(zero_points), list(quant_mins), list(quant_maxs)
    if not _eager.short_way(tensors):
        return _forward(*lists)
    if not _eager.learns(tensors):
        return _run_forward(*lists)
    return list(_Eager.apply(*lists[3:], *tensors))


def fake_quantize_all_reference(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    quant_mins: Sequence[int],
    quant_maxs: Sequence[int],
) -> list[Tensor]:
    """The definition that every other implementation must match."""
    each = zip(xs, scales, zero_points, quant_mins, quant_maxs, strict=True)
    return [
        fake_quantize_reference(x, scale, zero_point, low, high, _axis(scale), 0.0, None)
        for x, scale, zero_point, low, high in each
    ]


def fake_quantize_all_backward_reference(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    quant_mins: Sequence[int],
    quant_maxs: Sequence[int],
    needs_x: bool,
    needs_scale: bool,
    needs_zero_point: bool,
) -> list[Tensor]:
    """The gradients of all xs, of all scales, of all zero_points; empty where not needed."""
    each = zip(grads, xs, scales, zero_points, quant_mins, quant_maxs, strict=True)
    needs = needs_x, needs_scale, needs_zero_point
    gradients = [
        fake_quantize_backward_reference(
            grad, x, scale, zero_point, low, high, _axis(scale), 0.0, None, *needs
        )
        for grad, x, scale, zero_point, low, high in each
    ]
    return [gradient for kind in zip(*gradients, strict=True) for gradient in kind]


def _axis(scale: Tensor) -> int | None:
    return None if scale.numel() == 1 else 0


def has_rows(x: Tensor) -> bool:
    """Whether ``x`` may be one of ``xs``: each index of dimension 0 is a row of neighbours."""
    by_pixel = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.ndim > 0 and (by_pixel or x.is_contiguous())


def _check_rows(x: Tensor) -> None:
    if not has_rows(x):
        raise ValueError(
            f"each x must be contiguous or channels_last, got strides {list(x.stride())} for shape "
            f"{list(x.shape)}; use fake_quantize for this one."
        )


def _run_forward(xs: list[Tensor], *args: Any) -> list[Tensor]:
    return _implementation("fake_quantize_all", xs)(xs, *args)


def _run_backward(grads: list[Tensor], *args: Any) -> list[Tensor]:
    return _implementation("fake_quantize_all_backward", grads)(grads, *args)


def _implementation(op: str, xs: list[Tensor]) -> Callable[..., Any]:
    return _backend.implementation(op, xs[0].device.type)


_forward = torch.library.custom_op(
    "dfq::fake_quantize_all", fake_quantize_all_reference, mutates_args=()
)
_backward = torch.library.custom_op(
    "dfq::fake_quantize_all_backward", fake_quantize_all_backward_reference, mutates_args=()
)
for _device in ("cpu", "cuda"):
    _forward.register_kernel(_device)(_run_forward)
    _backward.register_kernel(_device)(_run_backward)


@_forward.register_fake
def _(xs: Sequence[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in xs]


@_backward.register_fake
def _(
    grads: Sequence[Tensor], xs: Sequence[Tensor], scales: Sequence[Tensor], *rest: Any
) -> list[Tensor]:
    *_, needs_x, needs_scale, needs_zero_point = rest
    return [
        *(torch.empty_like(x) if needs_x else x.new_empty(0) for x in xs),
        *(s.new_empty(s.shape if needs_scale else 0) for s in scales),
        *(s.new_empty(s.shape if needs_zero_point else 0) for s in scales),
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, scales, zero_points, ctx.quant_mins, ctx.quant_maxs = inputs
    ctx.save_for_backward(*xs, *scales, *zero_points)


def _thirds(values: Sequence[Any]) -> list[list[Any]]:
    count = len(values) // 3
    return [list(values[start : start + count]) for start in range(0, 3 * count, count)]


def _vjp(ctx: Any, grads: list[Tensor]) -> tuple[list[Tensor] | None, ...]:
    """Of the op, whose autograd says nothing about single tensors of a list: all gradients."""
    lists = _thirds(ctx.saved_tensors)
    results = _backward(grads, *lists, ctx.quant_mins, ctx.quant_maxs, True, True, True)
    return *_thirds(results), None, None


_forward.register_autograd(_vjp, setup_context=_save)


def _run_flat(quant_mins: list[int], quant_maxs: list[int], *tensors: Tensor) -> Any:
    return tuple(_run_forward(*_thirds(tensors), quant_mins, quant_maxs))


def _save_flat(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.quant_mins, ctx.quant_maxs, *tensors = inputs
    ctx.save_for_backward(*tensors)


def _vjp_flat(backward: Callable[..., Any], ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad[2:]
    needs = [any(third) for third in _thirds(wanted)]
    lists = _thirds(ctx.saved_tensors)
    results = backward(list(grads), *lists, ctx.quant_mins, ctx.quant_maxs, *needs)
    used = (result if needed else None for result, needed in zip(results, wanted, strict=True))
    return None, None, *used


_Eager = _eager.function(_run_flat, _save_flat, _vjp_flat, _backward, _run_backward)

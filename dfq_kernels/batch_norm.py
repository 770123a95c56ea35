"""BatchNorm in eval mode (+ ReLU) and the batch statistics of its input, in one read of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfq_kernels import _backend, _eager

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize ``x`` by the running statistics, and measure its own.

    ``y = (x - running_mean) * scale + bias`` with ``scale = weight / sqrt(running_var + eps)``,
    then ``max(y, 0)`` if ``relu``. ``mean`` and ``var`` are those of ``x`` over all dimensions but
    the channels', ``var`` without Bessel's correction: what BatchNorm in training mode would have
    normalized by (arXiv:1502.03167).

    All arithmetic is float32, each operation rounded once; ``1 / sqrt(running_var + eps)`` alone
    is taken in float64 and rounded. Running statistics get no gradient: they are measured, not
    learned. There is no second derivative.

    Args:
        x: [B, C, ...], float32, float16 or bfloat16, of any strides.
        running_mean: [C], float32.
        running_var: [C], float32, not negative.
        weight: [C], float32, or None for ones.
        bias: [C], float32, or None for zeros.
        eps: added to ``running_var``.
        relu: whether ``y`` is cut off at zero.

    Returns:
        y, in shape, dtype and memory layout as ``x``; mean and var, [C], float32.

    Raises:
        ValueError: if a shape or dtype is none of these.
    """
    _check_input(x)
    for name, values in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        _check_channels(name, values, x)
    args = (x, running_mean, running_var, weight, bias, eps, relu)
    if not _eager.short_way((x,)):
        return _forward(*args)
    return _Eager.apply(*args) if _eager.learns((x, weight, bias)) else _run_forward(*args)


def batch_norm_statistics(x: Tensor, running_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``x`` over all dimensions but the channels', in one read.

    Args:
        x: [B, C, ...], float32, float16 or bfloat16, of any strides.
        running_mean: [C], float32: a guess of the mean by which a kernel may shift its sums. It
            changes neither result by more than rounding, and gets no gradient.

    Returns:
        mean and var, [C], float32: what ``batch_norm`` returns beside ``y``.

    Raises:
        ValueError: if a shape or dtype is none of these.
    """
    _check_input(x)
    _check_channels("running_mean", running_mean, x)
    return _statistics(x, running_mean)


def batch_norm_reference(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition every other implementation must match; ``y`` bit for bit."""
    y = _affine(x, running_mean, running_var, weight, bias, eps)
    mean, var = batch_norm_statistics_reference(x, running_mean)
    return _as_layout_of(x, y.relu() if relu else y), mean, var


def batch_norm_statistics_reference(x: Tensor, running_mean: Tensor) -> tuple[Tensor, Tensor]:
    """The definition every other implementation must match, but for rounding."""
    var, mean = torch.var_mean(x.float(), _all_but_channels(x), correction=0)
    return mean, var


def batch_norm_backward_reference(
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
    """Gradients of ``batch_norm`` with respect to x and, if it ``learns``, weight and bias.

    ``grad_x = g * scale + (grad_mean / n + 2 * grad_var / n * (x - mean))`` where ``g`` is
    ``grad_y``, with ``relu`` where the value before it is above 0 and else 0, and ``n`` is the
    number of elements of a channel. Those of weight and bias are empty if it does not learn.
    """
    g = grad_y.float()
    if relu:
        g = g.where(_affine(x, running_mean, running_var, weight, bias, eps) > 0, 0)
    grad_x = g * _column(_scale(running_var, weight, eps), x)
    if grad_mean is not None or grad_var is not None:
        grad_x = grad_x + _of_statistics(grad_mean, grad_var, x, mean)
    grad_weight = grad_bias = x.new_empty(0, dtype=torch.float32)
    if learns:
        centered = x.float() - _column(running_mean, x)
        grad_bias = g.sum(_all_but_channels(x))
        grad_weight = (g * centered).sum(_all_but_channels(x)) * _scale(running_var, None, eps)
    return _as_layout_of(x, grad_x), grad_weight, grad_bias


def batch_norm_statistics_backward_reference(
    grad_mean: Tensor | None, grad_var: Tensor | None, x: Tensor, mean: Tensor
) -> Tensor:
    """Gradient of ``batch_norm_statistics`` with respect to x: the second term of the above."""
    return _as_layout_of(x, _of_statistics(grad_mean, grad_var, x, mean))


def _affine(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    y = (x.float() - _column(running_mean, x)) * _column(_scale(running_var, weight, eps), x)
    return y if bias is None else y + _column(bias, x)


def _scale(running_var: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    # float64, because float32 square roots are not rounded correctly everywhere
    inverse = (running_var.double() + eps).rsqrt().float()
    return inverse if weight is None else inverse * weight


def _of_statistics(
    grad_mean: Tensor | None, grad_var: Tensor | None, x: Tensor, mean: Tensor
) -> Tensor:
    count = x.shape[0] * x.shape[2:].numel()
    zero = torch.zeros_like(mean)
    offset = (zero if grad_mean is None else grad_mean) / count
    slope = (zero if grad_var is None else grad_var) * 2 / count
    return _column(offset, x) + _column(slope, x) * (x.float() - _column(mean, x))


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.ndim - 2))  # [C] -> [C, 1, ...]


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _as_layout_of(x: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(x).copy_(values)


def _check_input(x: Tensor) -> None:
    if x.ndim < 2:
        raise ValueError(f"x must be [B, C, ...], got {list(x.shape)}; add the missing dimensions.")
    if x.dtype not in _DTYPES:
        raise ValueError(
            f"x must be float32, float16 or bfloat16, got {x.dtype}; convert it with x.float()."
        )


def _check_channels(name: str, values: Tensor | None, x: Tensor) -> None:
    if values is None:
        return
    if values.shape != x.shape[1:2]:
        raise ValueError(
            f"{name} must be [{x.shape[1]}], one value per channel of x, got {list(values.shape)}."
        )
    if values.dtype != torch.float32:
        raise ValueError(f"{name} must be float32, got {values.dtype}; convert it with .float().")


_forward = torch.library.custom_op("dfq::batch_norm", batch_norm_reference, mutates_args=())
_statistics = torch.library.custom_op(
    "dfq::batch_norm_statistics", batch_norm_statistics_reference, mutates_args=()
)
_backward = torch.library.custom_op(
    "dfq::batch_norm_backward", batch_norm_backward_reference, mutates_args=()
)
_statistics_backward = torch.library.custom_op(
    "dfq::batch_norm_statistics_backward",
    batch_norm_statistics_backward_reference,
    mutates_args=(),
)


def _run_forward(x: Tensor, *args: Any) -> Any:
    return _backend.implementation("batch_norm", x.device.type)(x, *args)


def _run_statistics(x: Tensor, *args: Any) -> Any:
    return _backend.implementation("batch_norm_statistics", x.device.type)(x, *args)


def _run_backward(grad_y: Tensor, *args: Any) -> Any:
    return _backend.implementation("batch_norm_backward", grad_y.device.type)(grad_y, *args)


def _run_statistics_backward(
    grad_mean: Tensor | None, grad_var: Tensor | None, x: Tensor, mean: Tensor
) -> Any:
    run = _backend.implementation("batch_norm_statistics_backward", x.device.type)
    return run(grad_mean, grad_var, x, mean)


for _device in ("cpu", "cuda"):
    _forward.register_kernel(_device)(_run_forward)
    _statistics.register_kernel(_device)(_run_statistics)
    _backward.register_kernel(_device)(_run_backward)
    _statistics_backward.register_kernel(_device)(_run_statistics_backward)


@_forward.register_fake
def _(x: Tensor, running_mean: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _per_channel(x), _per_channel(x)


@_statistics.register_fake
def _(x: Tensor, running_mean: Tensor) -> tuple[Tensor, Tensor]:
    return _per_channel(x), _per_channel(x)


@_backward.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, learns = args[3], args[-1]
    grad_weight = _per_channel(x) if learns else x.new_empty(0, dtype=torch.float32)
    return torch.empty_like(x), grad_weight, torch.empty_like(grad_weight)


@_statistics_backward.register_fake
def _(grad_mean: Tensor | None, grad_var: Tensor | None, x: Tensor, mean: Tensor) -> Tensor:
    return torch.empty_like(x)


def _per_channel(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, running_mean, running_var, weight, bias, ctx.eps, ctx.relu = inputs
    ctx.save_for_backward(x, output[1], running_mean, running_var, weight, bias)
    ctx.set_materialize_grads(False)  # a loss that does not use an output costs nothing


def _vjp(
    backward: Callable[..., Any],
    ctx: Any,
    grad_y: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
) -> tuple[Tensor | None, ...]:
    x, mean, running_mean, running_var, weight, bias = ctx.saved_tensors
    if grad_y is None:
        return _of_measured(grad_mean, grad_var, x, mean), *[None] * 6
    _, _, _, weight_learns, bias_learns, *_ = ctx.needs_input_grad
    grad_x, grad_weight, grad_bias = backward(
        *(grad_y, grad_mean, grad_var, x, mean, running_mean, running_var, weight, bias),
        *(ctx.eps, ctx.relu, weight_learns or bias_learns),
    )
    of_weight = grad_weight if weight_learns else None
    return grad_x, None, None, of_weight, grad_bias if bias_learns else None, None, None


def _save_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.set_materialize_grads(False)


def _statistics_vjp(
    ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None
) -> tuple[Tensor | None, None]:
    return _of_measured(grad_mean, grad_var, *ctx.saved_tensors), None


def _of_measured(
    grad_mean: Tensor | None, grad_var: Tensor | None, x: Tensor, mean: Tensor
) -> Tensor | None:
    if grad_mean is None and grad_var is None:
        return None
    return _statistics_backward(grad_mean, grad_var, x, mean)


_forward.register_autograd(functools.partial(_vjp, _backward), setup_context=_save)
_statistics.register_autograd(_statistics_vjp, setup_context=_save_statistics)
_Eager = _eager.function(_run_forward, _save, _vjp, _backward, _run_backward)

"""Fake quantization with a straight-through gradient, learned scale and zero_point, and QDrop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dfq_kernels import _backend, _eager

LARGEST_CODE = 2**20  # below it every sum of a code and a zero_point is exact in float32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    drop: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Round ``x`` to the grid of integers ``[quant_min, quant_max]`` and back.

    ``code = clamp(round(x * (1 / scale)) + round(zero_point), quant_min, quant_max)`` and
    ``y = (code - round(zero_point)) * scale``, in float32 for every dtype of ``x``; ties go to
    even, NaN to ``quant_min``. The gradient passes to ``x`` where nothing was clamped (STE,
    arXiv:1308.3432). With ``inside`` for that, ``scale`` gets the sum of
    ``grad * (code - zero_point - (x / scale if inside else 0))`` (LSQ, arXiv:1902.08153) and
    ``zero_point`` the sum of ``0 if inside else -scale * grad``.

    With ``drop`` each element stays as it is with that probability (QDrop, arXiv:2203.05740):
    ``y = x``, gradient 1, nothing to ``scale`` and ``zero_point``. The element at position ``i``
    of the output's memory stays if the upper 24 bits of word ``i % 4`` of Philox4x32-10, with key
    ``seed`` and counter ``i // 4``, are below ``drop * 2**24``. So the same seed drops the same
    elements, on every backend.

    Args:
        x: any shape and strides; float32, float16 or bfloat16.
        scale: [1], or [x.shape[axis]]; float32, positive.
        zero_point: as ``scale``; beyond ±2**20 it counts as ±2**20.
        quant_min: smallest code, at least -2**20.
        quant_max: largest code, at most 2**20.
        axis: dimension of ``x`` with its own scale for each index; None is one for all.
        drop: probability from 0 to 1.
        seed: [1] or [], int64; change it every step. Needed if ``drop`` is not 0.

    Returns:
        Shape and dtype of ``x``; its strides too if ``x`` is dense.

    Raises:
        ValueError: if an argument is not as described.
    """
    if axis is not None and axis < 0:
        axis += x.ndim
    check_grid(x, scale, zero_point, axis)
    check_bounds(quant_min, quant_max)
    if drop:
        _check_drop(x, drop, seed)
    else:
        seed = None
    args = (x, scale, zero_point, quant_min, quant_max, axis, drop, seed)
    if not _eager.short_way((x,)):
        return _forward(*args)
    return _Eager.apply(*args) if _eager.learns((x, scale, zero_point)) else _run_forward(*args)


def fake_quantize_reference(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    drop: float,
    seed: Tensor | None,
) -> Tensor:
    """The definition that every other implementation must match."""
    inverse, scale, low, high = _grid(x, scale, zero_point, quant_min, quant_max, axis)
    y = _round_half_even(_clamp(x.float() * inverse, low, high)) * scale
    if seed is not None:
        y = torch.where(_stays_float(x, drop, seed), x, y)
    return torch.empty_like(x).copy_(y)


def fake_quantize_backward_reference(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    drop: float,
    seed: Tensor | None,
    needs_x: bool,
    needs_scale: bool,
    needs_zero_point: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, scale and zero_point; an empty tensor for each that is not needed."""
    inverse, step, low, high = _grid(x, scale, zero_point, quant_min, quant_max, axis)
    ratio = x.float() * inverse
    rounded = _round_half_even(_clamp(ratio, low - 1, high + 1))
    steps = _clamp(rounded, low, high)
    inside = steps == rounded
    for_scale = grad.float() * (steps - torch.where(inside, ratio, 0.0))
    for_zero_point = torch.where(inside, 0.0, grad.float())
    dx = torch.where(inside, grad, 0.0)
    if seed is not None:
        stays = _stays_float(x, drop, seed)
        for_scale, for_zero_point = (
            for_scale.masked_fill(stays, 0),
            for_zero_point.masked_fill(stays, 0),
        )
        dx = torch.where(stays, grad, dx)
    dscale = for_scale.double().sum_to_size(step.shape).reshape(scale.shape)
    dzero_point = -scale * for_zero_point.double().sum_to_size(step.shape).reshape(scale.shape)
    return (
        torch.empty_like(x).copy_(dx) if needs_x else x.new_empty(0),
        dscale.float() if needs_scale else scale.new_empty(0),
        dzero_point.float() if needs_zero_point else scale.new_empty(0),
    )


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): four words of 32 bits for each counter.

    Args:
        seed: [1] or [], int64: the key.
        counter: [N], int64: the lower half of the 128-bit counter; the upper half is 0.

    Returns:
        [N, 4], int64.
    """
    mask = 0xFFFFFFFF
    key = [seed.reshape(()) & mask, seed.reshape(()) >> 32 & mask]
    a, b = counter & mask, counter >> 32 & mask
    c, d = torch.zeros_like(a), torch.zeros_like(a)
    for _ in range(10):
        # int64 products wrap, and their bits are those of the unsigned product
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = (second >> 32 & mask) ^ b ^ key[0], second & mask
        c, d = (first >> 32 & mask) ^ d ^ key[1], first & mask
        key = [key[0] + 0x9E3779B9 & mask, key[1] + 0xBB67AE85 & mask]
    return torch.stack((a, b, c, d), dim=1)


def _stays_float(x: Tensor, drop: float, seed: Tensor) -> Tensor:
    """Which elements QDrop leaves as they are; shape of x."""
    counter = torch.arange((x.numel() + 3) // 4, device=x.device)
    words = philox(seed, counter).flatten()[: x.numel()]
    in_memory_order = (words >> 8) < int(drop * 2**24 + 0.5)
    return in_memory_order.as_strided(x.shape, torch.empty_like(x).stride())


def _grid(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1 / scale, scale, and the bounds minus zero_point; each broadcasts against x."""
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    zero_point = _clamp(
        zero_point,
        torch.full_like(zero_point, -LARGEST_CODE),
        torch.full_like(zero_point, LARGEST_CODE),
    )
    zero_point = _round_half_even(zero_point)
    parts = (1.0 / scale, scale, quant_min - zero_point, quant_max - zero_point)
    inverse, scale, low, high = (part.reshape(shape) for part in parts)
    return inverse, scale, low, high


def _round_half_even(value: Tensor) -> Tensor:
    return torch.round(value) + 0.0  # -0 becomes 0


def _clamp(value: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """As torch.clamp, but NaN becomes low."""
    raised = torch.where(value > low, value, low)
    return torch.where(raised < high, raised, high)


def check_bounds(quant_min: int, quant_max: int) -> None:
    """Refuse bounds that are no range of codes, or outside what float32 counts exactly.

    Raises:
        ValueError: naming both.
    """
    if not -LARGEST_CODE <= quant_min < quant_max <= LARGEST_CODE:
        raise ValueError(
            f"quant_min must be below quant_max and both within ±2**20, got {quant_min} and "
            f"{quant_max}."
        )


def check_grid(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None) -> None:
    """Refuse a dtype of x, or scale and zero_point that are not one for each index of ``axis``.

    Raises:
        ValueError: naming what was found and the remedy.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}; convert it.")
    if axis is not None and not 0 <= axis < x.ndim:
        raise ValueError(f"axis must be a dimension of x, which has {x.ndim}, got {axis}.")
    expected = (1 if axis is None else x.shape[axis],)
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor.shape != expected or tensor.dtype != torch.float32 or tensor.device != x.device:
            raise ValueError(
                f"{name} must be float32 of shape {list(expected)} on {x.device}, got "
                f"{tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}; convert it with "
                f"{name}.flatten().to(x.device, torch.float32)."
            )


def _check_drop(x: Tensor, drop: float, seed: Tensor | None) -> None:
    if not 0 <= drop <= 1:
        raise ValueError(f"drop must be a probability from 0 to 1, got {drop}.")
    if seed is None:
        raise ValueError("drop needs seed, an int64 tensor of one element, got none.")
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise ValueError(
            f"seed must be an int64 tensor of one element on {x.device}, got {seed.dtype} of shape "
            f"{list(seed.shape)} on {seed.device}; write e.g. torch.tensor([0], device=x.device)."
        )


def _run_forward(x: Tensor, *args: Any) -> Tensor:
    return _backend.implementation("fake_quantize", x.device.type)(x, *args)


def _run_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _backend.implementation("fake_quantize_backward", grad.device.type)(grad, *args)


_forward = torch.library.custom_op("dfq::fake_quantize", fake_quantize_reference, mutates_args=())
_backward = torch.library.custom_op(
    "dfq::fake_quantize_backward", fake_quantize_backward_reference, mutates_args=()
)
for _device in ("cpu", "cuda"):
    _forward.register_kernel(_device)(_run_forward)
    _backward.register_kernel(_device)(_run_backward)


@_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, needs_x, needs_scale, needs_zero_point = rest
    return (
        torch.empty_like(x) if needs_x else x.new_empty(0),
        scale.new_empty(scale.shape if needs_scale else 0),
        scale.new_empty(scale.shape if needs_zero_point else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, zero_point, *ctx.numbers, seed = inputs
    ctx.save_for_backward(x, scale, zero_point, seed)


def _gradients(backward: Callable[..., Any], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    results = backward(grad, x, scale, zero_point, *ctx.numbers, seed, *needs)
    used = (result if needed else None for result, needed in zip(results, needs, strict=True))
    return *used, None, None, None, None, None


_forward.register_autograd(functools.partial(_gradients, _backward), setup_context=_save)


_Eager = _eager.function(_run_forward, _save, _gradients, _backward, _run_backward)

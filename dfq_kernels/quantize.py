"""Float to int8 activations and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dfq_kernels import _backend
from dfq_kernels.fake_quantize import DTYPES, _clamp, _grid, _round_half_even

INT8_MIN, INT8_MAX = -128, 127


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    offset: int = 0,
) -> Tensor:
    """Round ``x`` to the grid of integers ``[quant_min, quant_max]``, in int8.

    ``code = clamp(round(x * (1 / scale)) + round(zero_point), quant_min, quant_max)``, rounded as
    ``fake_quantize`` rounds, and stored as ``code - offset``. Real zero is then stored as
    ``zero_point - offset``: that is the ``x_zero`` of ``qconv2d`` and ``qlinear``. Choose
    ``offset = zero_point`` where the codes then fit int8 (real zero is 0), otherwise 128.

    There is no gradient; train with ``fake_quantize``.

    Args:
        x: any shape and strides; float32, float16 or bfloat16.
        scale: [1], float32, positive.
        zero_point: [1], float32; beyond ±2**20 it counts as ±2**20.
        quant_min: smallest code.
        quant_max: largest code.
        offset: what is subtracted from each code.

    Returns:
        int8, shape of ``x``; [B, C, H, W] is in channels_last memory, all else contiguous.

    Raises:
        ValueError: if an argument is not as described, or the stored codes do not fit int8.
    """
    _check(x, scale, zero_point)
    if not INT8_MIN <= quant_min - offset < quant_max - offset <= INT8_MAX:
        raise ValueError(
            f"codes minus offset must fit int8, got {quant_min} to {quant_max} minus {offset}; "
            "choose another offset, e.g. 128 for 0 to 255."
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "quantize has no gradient but x requires one; use fake_quantize, or torch.no_grad()."
        )
    args = (x, scale, zero_point, quant_min, quant_max, offset)
    # the dispatcher's way through Python takes longer, and its first call imports torch._dynamo
    direct = type(x) is Tensor and not torch.compiler.is_compiling()
    return _run(*args) if direct else _quantize(*args)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, offset: int = 0) -> Tensor:
    """What the stored codes stand for: ``(codes + offset - round(zero_point)) * scale``.

    ``dequantize(quantize(x, …))`` is ``fake_quantize(x.float(), …)``, bit for bit.

    Args:
        codes: any shape, int8.
        scale: [1], float32.
        zero_point: [1], float32.
        offset: as for ``quantize``.

    Returns:
        float32, shape and strides of ``codes``.
    """
    _, step, low, _ = _grid(codes, scale, zero_point, 0, 0, None)
    return ((codes.float() + offset) + low) * step


def quantize_reference(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, offset: int
) -> Tensor:
    """The definition that every other implementation must match."""
    inverse, _, low, high = _grid(x, scale, zero_point, quant_min, quant_max, None)
    steps = _round_half_even(_clamp(x.float() * inverse, low, high))
    return empty_codes(x).copy_(steps + (quant_min - low) - offset)


def empty_codes(x: Tensor) -> Tensor:
    """int8, shape of ``x``, in the memory layout that ``quantize`` gives."""
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    return torch.empty(x.shape, dtype=torch.int8, device=x.device, memory_format=layout)


def _check(x: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x must be float32, float16 or bfloat16, got {x.dtype}; convert it.")
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor.shape != (1,) or tensor.dtype != torch.float32 or tensor.device != x.device:
            raise ValueError(
                f"{name} must be float32 of shape [1] on {x.device}, got {tensor.dtype} of shape "
                f"{list(tensor.shape)} on {tensor.device}."
            )


_quantize = torch.library.custom_op("dfq::quantize", quantize_reference, mutates_args=())


def _run(x: Tensor, *args: Any) -> Tensor:
    return _backend.implementation("quantize", x.device.type)(x, *args)


for _device in ("cpu", "cuda"):
    _quantize.register_kernel(_device)(_run)


@_quantize.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return empty_codes(x)

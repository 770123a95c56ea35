"""Integers of one grid as integers of another, without the floats between in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from dfq_kernels import _backend
from dfq_kernels.fake_quantize import _clamp, _round_half_even
from dfq_kernels.integer import Int8Grid, check_grid


def requantize(codes: Tensor, ratio: tuple[float, float], zero: int, grid: Int8Grid) -> Tensor:
    """What ``quantize(dequantize(codes))`` gives, from one grid to another.

    ``clamp(round((codes - zero) * scale * (1 / new_scale)) + grid.zero, grid.low, grid.high)``, in
    float32, each operation rounded once and ties to even: as a student rounds the values that the
    codes stand for.

    Args:
        codes: any shape, int8; contiguous or channels_last.
        ratio: scale and new_scale, positive; they count as float32.
        zero: what stands for real zero in ``codes``.
        grid: of the result.

    Returns:
        int8, in shape and strides of ``codes``.

    Raises:
        ValueError: if an argument is not as described.
    """
    if codes.dtype != torch.int8:
        raise ValueError(f"codes must be int8, got {codes.dtype}; make them with quantize.")
    last = torch.channels_last
    by_pixel = codes.ndim == 4 and codes.is_contiguous(memory_format=last)
    if not (by_pixel or codes.is_contiguous()):
        raise ValueError(
            f"codes must be contiguous or channels_last, got strides {codes.stride()}; call "
            ".contiguous() on them."
        )
    if min(ratio) <= 0:
        raise ValueError(f"both scales must be positive, got {ratio}.")
    check_grid(grid)
    if grid.packed:
        raise ValueError("requantize writes int8 only; pack them with pack_channels.")
    args = (codes, *ratio, zero, grid.zero, grid.low, grid.high)
    # the dispatcher's way through Python takes longer, and its first call imports torch._dynamo
    direct = type(codes) is Tensor and not torch.compiler.is_compiling()
    return _run(*args) if direct else _requantize(*args)


def requantize_reference(
    codes: Tensor, scale: float, new_scale: float, zero: int, new_zero: int, low: int, high: int
) -> Tensor:
    """The definition that every other implementation must match."""
    step, inverse = codes.new_tensor([scale, 1.0], dtype=torch.float32)
    inverse = inverse / codes.new_tensor(new_scale, dtype=torch.float32)
    values = (codes.float() - zero) * step
    ends = (values.new_tensor(low - new_zero), values.new_tensor(high - new_zero))
    rounded = _round_half_even(_clamp(values * inverse, *ends)) + new_zero
    return torch.empty_like(codes).copy_(rounded)


_requantize = torch.library.custom_op("dfq::requantize", requantize_reference, mutates_args=())


def _run(codes: Tensor, *args: float) -> Tensor:
    return _backend.implementation("requantize", codes.device.type)(codes, *args)


for _device in ("cpu", "cuda"):
    _requantize.register_kernel(_device)(_run)


@_requantize.register_fake
def _(codes: Tensor, *_: float) -> Tensor:
    return torch.empty_like(codes)

"""A convolution of integers, with everything up to the next layer's integers in one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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


@dataclass(frozen=True)
class Window:
    """Where a convolution looks, along height and width; as in ``torch.nn.Conv2d``."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def output_size(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the output, from those of the input."""
        height, width = (
            (n + 2 * pad - dilation * (k - 1) - 1) // stride + 1
            for n, k, stride, pad, dilation in zip(
                size, kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )
        return height, width


def qconv2d(
    x: Tensor,
    weight: IntegerWeight,
    epilogue: Epilogue,
    window: Window = Window(),
    *,
    x_zero: int = 0,
) -> Tensor:
    """Convolve ``x - x_zero`` with the integers of ``weight``, and let ``epilogue`` finish it.

    The sums are exact, in int32. Beyond the border ``x`` is ``x_zero``, real zero. There is no
    gradient.

    Args:
        x: [B, C, H, W], int8, in channels_last memory: as ``quantize`` makes it; or [B, C / 2, H,
            W], uint8, by ``pack_channels``.
        weight: of shape [O, kh, kw, C / groups]; ``prepack`` it once, for the CPU.
        epilogue: scale, bias, residual, ReLU, and the grid of the output.
        window: stride, padding, dilation and groups.
        x_zero: what stands for real zero in ``x``.

    Returns:
        [B, O, H', W'] in channels_last memory; int8 if ``epilogue`` has a grid, else float32.
        Packed: [B, O / 2, H', W'], uint8.

    Raises:
        ValueError: if an argument is not as described, or sums could leave int32.
    """
    check(x, weight, epilogue, x_zero)
    _check_images(x, weight, window)
    kernel = (weight.shape[1], weight.shape[2])
    size = window.output_size((x.shape[2], x.shape[3]), kernel)
    if min(size) < 1:
        raise ValueError(
            f"a kernel of {kernel} with dilation {window.dilation} does not fit into "
            f"{list(x.shape)} with padding {window.padding}."
        )
    if epilogue.grid is not None and epilogue.grid.packed:
        check_packed("the output", weight.shape[0], window.groups)
    shape = (x.shape[0], weight.shape[0], *size)
    check_residual(epilogue.residual, shape, 1, window.groups)
    if epilogue.residual is not None:
        _check_layout("the residual", epilogue.residual.values)
    geometry = (window.stride, window.padding, window.dilation, window.groups)
    tensors = (x, weight.values, weight.zero, weight.prepacked)
    args = (*tensors, x_zero, kernel, *geometry, *epilogue.arguments())
    # a small layer is done before the dispatcher has found its way through Python
    direct = type(x) is Tensor and not torch.compiler.is_compiling()
    return _run(*args) if direct else _qconv2d(*args)


def qconv2d_reference(
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
    """The definition that every other implementation must match, bit for bit."""
    x = unpack_channels(x)
    shape = [multiplier.shape[0], *kernel_size, x.shape[1] // groups]
    whole = integers(weight, weight_zero, shape).permute(0, 3, 1, 2)
    # float64 holds every sum, and every part of one, exactly
    centered, whole = x.double() - x_zero, whole.double()
    sums = F.conv2d(centered, whole, None, stride, padding, dilation, groups)
    last = None if residual is None else residual.permute(0, 2, 3, 1)
    rest = (residual_multiplier, residual_zero, relu, grid)
    y = finish(sums.permute(0, 2, 3, 1), multiplier, bias, last, *rest)
    return _empty(x, y.permute(0, 3, 1, 2).shape, y.dtype).copy_(y.permute(0, 3, 1, 2))


def _empty(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


def _check_images(x: Tensor, weight: IntegerWeight, window: Window) -> None:
    if x.ndim != 4 or len(weight.shape) != 4:
        raise ValueError(
            f"x must be [B, C, H, W] and weights [O, kh, kw, C / groups], got {list(x.shape)} and "
            f"{list(weight.shape)}."
        )
    _check_layout("x", x)
    out, *_, channels = weight.shape
    if x.dtype == torch.uint8:
        check_packed("x", channels_of(x, 1), window.groups)
    if channels * window.groups != channels_of(x, 1) or out % window.groups:
        raise ValueError(
            f"weights {list(weight.shape)} with groups={window.groups} do not fit x of "
            f"{channels_of(x, 1)} channels."
        )
    if min(*window.stride, *window.dilation) < 1 or min(window.padding) < 0:
        raise ValueError(f"strides and dilations must be positive, padding not negative: {window}.")


def _check_layout(name: str, images: Tensor) -> None:
    if not images.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"{name} must be in channels_last memory, got strides {images.stride()}; call "
            ".contiguous(memory_format=torch.channels_last)."
        )


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


_qconv2d = torch.library.custom_op("dfq::qconv2d", qconv2d_reference, mutates_args=())


def _run(x: Tensor, *args: Any) -> Tensor:
    return _backend.implementation("qconv2d", x.device.type)(x, *args)


for _device in ("cpu", "cuda"):
    _qconv2d.register_kernel(_device)(_run)


@_qconv2d.register_fake
def _(
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
    *rest: Any,
) -> Tensor:
    window = Window(_pair(stride), _pair(padding), _pair(dilation), groups)
    size = window.output_size((x.shape[2], x.shape[3]), _pair(kernel_size))
    channels, dtype = output_of(multiplier.shape[0], rest[-1])
    return _empty(x, (x.shape[0], channels, *size), dtype)

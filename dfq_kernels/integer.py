"""What the integer layers ``qconv2d`` and ``qlinear`` share: weights, and how sums become outputs.

Sums are exact integers. From a sum ``a`` of channel ``c`` the output is, in float32 and each
operation rounded once,

    f = a * multiplier[c] + bias[c]
    f = f + (residual - residual.zero) * residual.multiplier
    f = f if f > 0 else 0                                      with relu
    y = clamp(round(f) + grid.zero, grid.low, grid.high)       with a grid: int8, ties to even

What has only 4 bits, -8 to 7, may lie in memory by ``packing.pack_channels``: the input, the
residual, and with ``grid.packed`` the output. They are uint8 then, with half as many channels.

The product and the addition are two roundings and not a fused one, because that is what every
backend can do alike: PyTorch has no fused operation that rounds once, and float64 rounds twice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dfq_kernels import _backend
from dfq_kernels.fake_quantize import _clamp, _round_half_even
from dfq_kernels.packing import check_packed, pack_int4, packed_size, unpack_int4
from dfq_kernels.quantize import INT8_MAX, INT8_MIN

LARGEST_SUM = 2**31 - 1  # int32
INT4_MIN, INT4_MAX = -8, 7


@dataclass(frozen=True)
class IntegerWeight:
    """The weights of an integer layer, ``values - zero``.

    Attributes:
        values: ``shape``, int8; or two 4-bit integers a byte, ``pack_int4`` of [O, K] with K all
            but the first of ``shape``.
        shape: [O, kh, kw, C / groups] of a convolution, [O, K] of a linear layer.
        zero: [O], int8, what stands for real zero; None if that is 0.
        prepacked: the same weights as the CPU kernels read them, made by ``prepack``; not to be
            saved.
    """

    values: Tensor
    shape: tuple[int, ...]
    zero: Tensor | None = None
    prepacked: Tensor | None = None

    def integers(self) -> Tensor:
        """``values - zero``, in ``shape``; int32."""
        return integers(self.values, self.zero, list(self.shape))


@dataclass(frozen=True)
class Residual:
    """``(values - zero) * multiplier`` is added to the output.

    Attributes:
        values: int8, in shape and memory layout of the output; or packed, as a packed output is.
        multiplier: their scale, over that of the output.
        zero: what stands for real zero among them.
    """

    values: Tensor
    multiplier: float
    zero: int = 0


@dataclass(frozen=True)
class Int8Grid:
    """The integers that an output is stored as: ``low`` to ``high``, and ``zero`` for real zero.

    If ``packed``, two in a byte; they must be -8 to 7 and a multiple of 64 channels.
    """

    zero: int = 0
    low: int = INT8_MIN
    high: int = INT8_MAX
    packed: bool = False

    def numbers(self) -> list[int]:
        """As the ops take it: zero, low, high, and 1 if packed."""
        return [self.zero, self.low, self.high, *([1] if self.packed else [])]


@dataclass(frozen=True)
class Epilogue:
    """From the sums of a layer to its output; the formula stands on top of this file.

    Attributes:
        multiplier: [O], float32, finite. For an output with scale ``s``: the scale of x times that
            of the weights, over ``s``.
        bias: [O], float32, in units of the output's scale; None for zeros.
        residual: what is added.
        relu: whether what is below zero becomes zero.
        grid: of an int8 output; None for float32.
    """

    multiplier: Tensor
    bias: Tensor | None = None
    residual: Residual | None = None
    relu: bool = False
    grid: Int8Grid | None = None

    def arguments(
        self,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, float, int, bool, list[int]]:
        """As the ops take them, in their order."""
        residual = self.residual
        grid = [] if self.grid is None else self.grid.numbers()
        if residual is None:
            return self.multiplier, self.bias, None, 0.0, 0, self.relu, grid
        rest = (residual.values, residual.multiplier, residual.zero, self.relu, grid)
        return self.multiplier, self.bias, *rest


def integer_weight(
    values: Tensor, zero: Tensor | None = None, *, four_bits: bool = False
) -> IntegerWeight:
    """The weights of a layer from integers that are not packed.

    Args:
        values: [O, kh, kw, C / groups] or [O, K], int8.
        zero: [O], int8, or None.
        four_bits: store two in a byte; they must be -8 to 7.
    """
    shape = tuple(values.shape)
    stored = pack_int4(values.flatten(1)) if four_bits else values.contiguous()
    return IntegerWeight(stored, shape, zero)


def prepack(weight: IntegerWeight, *, groups: int = 1, dilation: int = 1) -> IntegerWeight:
    """``weight`` with what the CPU kernels read beside it, so that no call has to make it.

    Where there are no such kernels, or on another device, ``weight`` as it is.

    Args:
        weight: of a convolution or a linear layer.
        groups: of the convolution.
        dilation: of the convolution, along the width.
    """
    make = _backend.variant("prepack_weight", "compiled", weight.values.device.type)
    if make is None or weight.values.device.type != "cpu":
        return weight
    out, *rest = weight.shape
    shape = [out, *rest] if len(rest) == 3 else [out, 1, 1, *rest]
    return dataclasses.replace(weight, prepacked=make(weight.values, shape, groups, dilation))


def integers(values: Tensor, zero: Tensor | None, shape: list[int]) -> Tensor:
    """Stored weights, unpacked, less their zero; int32."""
    if values.dtype == torch.uint8:
        values = unpack_int4(values, torch.Size(shape[1:]).numel())
    whole = values.reshape(shape).int()
    return whole if zero is None else whole - zero.int().view(-1, *[1] * (len(shape) - 1))


def finish(
    sums: Tensor,
    multiplier: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_multiplier: float,
    residual_zero: int,
    relu: bool,
    grid: list[int],
) -> Tensor:
    """Outputs from ``sums``, [..., O] of any type that holds them exactly."""
    f = sums.float() * multiplier
    f = f + (torch.zeros_like(multiplier) if bias is None else bias)
    if residual is not None:
        if residual.dtype == torch.uint8:
            residual = unpack_int4(residual, 2 * residual.shape[-1])
        f = f + (residual.float() - residual_zero) * residual_multiplier
    if relu:
        f = torch.where(f > 0, f, 0.0)
    if not grid:
        return f
    zero, low, high, *packed = grid
    ends = (f.new_tensor(low - zero), f.new_tensor(high - zero))
    codes = (_round_half_even(_clamp(f, *ends)) + zero).to(torch.int8)
    return pack_int4(codes) if packed else codes


def output_of(channels: int, grid: list[int]) -> tuple[int, torch.dtype]:
    """How many values a pixel of the output has, and of which type."""
    if len(grid) > 3:
        return channels // 2, torch.uint8
    return channels, torch.int8 if grid else torch.float32


def check(x: Tensor, weight: IntegerWeight, epilogue: Epilogue, x_zero: int) -> None:
    """What both layers need of their arguments.

    Raises:
        ValueError: if something is not as described, or sums could leave int32.
    """
    if x.dtype not in (torch.int8, torch.uint8):
        raise ValueError(
            f"x must be int8, or uint8 with two 4-bit integers a byte, got {x.dtype}; make it so "
            "with dfq_kernels.quantize."
        )
    _check_stored("x_zero", x_zero, packed=x.dtype == torch.uint8)
    _check_weight(weight)
    out = (weight.shape[0],)
    for name, tensor, dtype in (
        ("multiplier", epilogue.multiplier, torch.float32),
        ("bias", epilogue.bias, torch.float32),
        ("the weights' zero", weight.zero, torch.int8),
    ):
        if tensor is not None and (tensor.shape != out or tensor.dtype != dtype):
            raise ValueError(
                f"{name} must be {dtype} of shape {list(out)}, got {tensor.dtype} of shape "
                f"{list(tensor.shape)}."
            )
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"integer layers have no gradient but {name} requires one; detach it, or use "
                "torch.no_grad()."
            )
    check_grid(epilogue.grid)


def check_residual(
    residual: Residual | None, shape: tuple[int, ...], axis: int, groups: int = 1
) -> None:
    """Its dtype and shape, which must be that of the output, packed or not.

    Args:
        residual: what is added, if anything.
        shape: of the output, not packed.
        axis: of its channels.
        groups: of the layer.

    Raises:
        ValueError: if they are others.
    """
    if residual is None:
        return
    found, expected = residual.values, list(shape)
    packed = found.dtype == torch.uint8
    _check_stored("the zero of the residual", residual.zero, packed=packed)
    if packed:
        check_packed("the residual", shape[axis], groups)
        expected[axis] //= 2
    if found.dtype not in (torch.int8, torch.uint8) or list(found.shape) != expected:
        raise ValueError(
            f"the residual must be int8 of shape {list(shape)}, or packed as such an output is, "
            f"got {found.dtype} of shape {list(found.shape)}."
        )


def _check_weight(weight: IntegerWeight) -> None:
    values, (out, *rest) = weight.values, weight.shape
    size = torch.Size(rest).numel()
    expected = (out, packed_size(size)) if values.dtype == torch.uint8 else weight.shape
    if values.dtype not in (torch.int8, torch.uint8) or values.shape != expected:
        raise ValueError(
            f"weights of shape {list(weight.shape)} must be int8, or uint8 by pack_int4 with two "
            f"in a byte, got {values.dtype} of shape {list(values.shape)}."
        )
    if not values.is_contiguous():
        raise ValueError("weights must be contiguous; call .contiguous() on them.")
    largest = 255 * (128 if weight.zero is None else 255)
    if size * largest > LARGEST_SUM:
        raise ValueError(
            f"sums of {size} products may leave int32; at most {LARGEST_SUM // largest} are safe."
        )


def check_grid(grid: Int8Grid | None) -> None:
    """The integers of an output.

    Raises:
        ValueError: if they do not fit int8, or there are none.
    """
    if grid is None:
        return
    for name, value in (("zero", grid.zero), ("low", grid.low), ("high", grid.high)):
        _check_stored(f"{name} of the output's grid", value, packed=grid.packed)
    if grid.low > grid.high:
        raise ValueError(f"the output's grid must not be empty, got {grid.low} to {grid.high}.")


def _check_stored(name: str, value: int, *, packed: bool) -> None:
    least, most = (INT4_MIN, INT4_MAX) if packed else (INT8_MIN, INT8_MAX)
    if not least <= value <= most:
        kind = f"{least} to {most} where values are packed" if packed else "an int8"
        raise ValueError(f"{name} must be {kind}, got {value}.")

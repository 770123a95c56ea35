"""A fused layer as one step: BatchNorm folded into multiplier and bias, weights as integers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from dfq.deploy.chains import Chain
from dfq.deploy.program import Grid
from dfq.prepare.layers import QConv2d
from dfq.prepare.quantizer import Quantizer
from dfq.types import InputError
from dfq_kernels import integer_weight

PACKED_BITS = 4  # up to so many, two weights share a byte


def grid_of(quantizer: Quantizer) -> Grid:
    """The grid of an activation quantizer.

    Raises:
        InputError: if it has no scale.
    """
    scale, zero_point = quantizer.qparams(quantizer.zero_point)
    spec = quantizer.spec
    zero = int(zero_point.round().item())
    return Grid(float(scale.item()), zero, spec.quant_min, spec.quant_max)


def integer_weights(layer: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 integers in the layout of the op, their scale [O], and what stands for zero [O] or None.

    The levels of a midrise grid lie at odd multiples of half a scale.
    """
    quantizer = layer.weight_quantizer
    scale, zero_point = quantizer.qparams(layer.weight)
    values = quantizer.codes(layer.weight)
    if quantizer.spec.midrise:
        values, scale = 2 * values + 1, scale / 2
    if values.ndim == 4:
        values = values.permute(0, 2, 3, 1)
    outputs = values.shape[0]
    scale, zero = scale.detach().expand(outputs), zero_point.round().to(torch.int8).expand(outputs)
    return values.contiguous(), scale, zero.contiguous() if zero.any() else None


def fold(chain: Chain, source: Grid, output: Grid | None, carried: Grid | None) -> Folded:
    """Numbers and tensors of the step of a chain.

    Args:
        chain: the layer and what follows it.
        source: grid of its input.
        output: grid of what it writes; None for float32.
        carried: grid of the other branch, if an addition is part of it.
    """
    layer = chain.layer
    values, scale, zero = integer_weights(layer)
    gain, shift = _affine(layer, chain.norm)
    unit = output.scale if output else 1.0
    weight = integer_weight(values, zero, four_bits=layer.weight_quantizer.spec.bits <= PACKED_BITS)
    tensors = {
        "weight": weight.values,
        "multiplier": (scale.double() * source.scale * gain / unit).float(),
        "bias": (shift / unit).float(),
    }
    if zero is not None:
        tensors["weight_zero"] = zero
    numbers: dict[str, Any] = {
        "shape": list(weight.shape),
        "zero": source.zero,
        "relu": chain.relu,
        "ceiling": chain.ceiling if output else None,
        "grid": output.as_dict() if output else None,
        "bits": [
            layer.weight_quantizer.spec.bits,
            (source.quant_max - source.quant_min).bit_length(),
        ],
    }
    if carried:
        numbers |= {"carried_multiplier": carried.scale / unit, "carried_zero": carried.zero}
    if isinstance(layer, QConv2d):
        numbers |= _window(layer)
    return Folded(numbers, tensors)


def unfused(layer: Any) -> Folded:
    """Numbers and tensors of the step of a layer whose input is float: the weights are integers."""
    values, scale, zero = integer_weights(layer)
    packs = layer.weight_quantizer.spec.bits <= PACKED_BITS
    weight = integer_weight(values, zero, four_bits=packs)
    tensors = {"weight": weight.values, "scale": scale}
    if zero is not None:
        tensors["weight_zero"] = zero
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    window = _window(layer) if isinstance(layer, QConv2d) else {}
    return Folded({"shape": list(weight.shape)} | window, tensors)


@dataclasses.dataclass(frozen=True)
class Folded:
    """What a step needs."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]


def _affine(layer: nn.Module, norm: Any) -> tuple[Tensor, Tensor]:
    """What BatchNorm makes of the layer: ``gain * (W x) + shift``; float64, [O]."""
    outputs = layer.get_parameter("weight").shape[0]
    gain = torch.ones(outputs, dtype=torch.float64, device=layer.get_parameter("weight").device)
    shift = torch.zeros_like(gain)
    if layer.bias is not None:
        shift = shift + layer.get_parameter("bias").detach().double()
    if norm is None:
        return gain, shift
    gain = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.detach().double()
    shift = (shift - norm.running_mean.double()) * gain
    return gain, shift if norm.bias is None else shift + norm.bias.detach().double()


def _window(layer: QConv2d) -> dict[str, Any]:
    if layer.padding_mode != "zeros":
        raise InputError(f"padding_mode={layer.padding_mode!r} has no integer kernel; use zeros.")
    padding: Any = layer.padding
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            raise InputError("padding 'same' of an even kernel has no integer kernel; pad before.")
        padding = [r // 2 for r in reach] if padding == "same" else [0, 0]
    return {
        "stride": list(layer.stride),
        "padding": list(padding),
        "dilation": list(layer.dilation),
        "groups": layer.groups,
    }

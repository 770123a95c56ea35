"""Drop-in quantized layers: constructor, parameters and shapes of their float parents.

[B, C, H, W] throughout; QLinear takes [..., C].
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.prepare.quantizer import Mode, Quantizer
from dfq.types import InputError, QuantSpec

Pair = int | tuple[int, int]
Device = torch.device | str | None


class QConv2d(nn.Conv2d):
    """``nn.Conv2d`` on a fake-quantized weight and, with ``input_spec``, a fake-quantized input.

    The input is quantized before it is padded, so padded zeros are zeros.

    Args:
        weight_spec: grid of the weight; its axis is 0 (one scale an output channel) or None.
        input_spec: grid of the input, per tensor; None leaves the input float.
        scales: "learned" (LSQ), or "minmax": the weight's own range, a moving average for inputs.

    The other arguments are those of ``nn.Conv2d``.

    Raises:
        InputError: if a spec has another axis.
    """

    quantized_weight: Tensor | None = None  # while a forward of the student runs: together.py

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: str | Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        weight_spec: QuantSpec,
        input_spec: QuantSpec | None = None,
        scales: str = "learned",
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self.weight_quantizer = _weight_quantizer(self.weight, weight_spec, scales)
        self.input_quantizer = _input_quantizer(self.weight, input_spec, scales)

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        weight_spec: QuantSpec,
        input_spec: QuantSpec | None = None,
        *,
        scales: str = "learned",
    ) -> QConv2d:
        """A quantized layer that shares the parameters of ``conv``."""
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        geometry: dict[str, Any] = {name: getattr(conv, name) for name in names}
        quantized = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            bias=conv.bias is not None,
            device="meta",  # no memory, no initialization: the parameters are replaced
            weight_spec=weight_spec,
            **geometry,
        )
        return _adopt(quantized, conv, weight_spec, input_spec, scales)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H', W']."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight = self.quantized_weight
        if weight is None:
            weight = self.weight_quantizer(self.weight)
        return self._conv_forward(x, weight, self.bias)


class QLinear(nn.Linear):
    """``nn.Linear`` on a fake-quantized weight and, with ``input_spec``, a fake-quantized input.

    Arguments as for ``nn.Linear`` and ``QConv2d``.
    """

    quantized_weight: Tensor | None = None  # while a forward of the student runs: together.py

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        weight_spec: QuantSpec,
        input_spec: QuantSpec | None = None,
        scales: str = "learned",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.weight_quantizer = _weight_quantizer(self.weight, weight_spec, scales)
        self.input_quantizer = _input_quantizer(self.weight, input_spec, scales)

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        weight_spec: QuantSpec,
        input_spec: QuantSpec | None = None,
        *,
        scales: str = "learned",
    ) -> QLinear:
        """A quantized layer that shares the parameters of ``linear``."""
        quantized = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",
            weight_spec=weight_spec,
        )
        return _adopt(quantized, linear, weight_spec, input_spec, scales)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        weight = self.quantized_weight
        if weight is None:
            weight = self.weight_quantizer(self.weight)
        return F.linear(x, weight, self.bias)


class QReLU(nn.Module):
    """``nn.ReLU`` (or ``nn.ReLU6``) whose output is fake-quantized: the gdfq protocol.

    Args:
        spec: grid of the output, per tensor.
        maximum: 6 for ReLU6, None for ReLU.
        inplace: overwrite the input with its positive part, as ``nn.ReLU`` does.
        scales: "learned" (LSQ) or "minmax" (moving average).
        device: of the scale.
    """

    def __init__(
        self,
        spec: QuantSpec,
        *,
        maximum: float | None = None,
        inplace: bool = False,
        scales: str = "learned",
        device: Device = None,
    ) -> None:
        super().__init__()
        self.maximum, self.inplace = maximum, inplace
        self.quantizer = per_tensor_quantizer(spec, scales, device)

    @classmethod
    def from_float(
        cls,
        relu: nn.ReLU | nn.ReLU6,
        spec: QuantSpec,
        *,
        scales: str = "learned",
        device: Device = None,
    ) -> QReLU:
        """The quantized form of ``relu``, which has no device of its own."""
        maximum = relu.max_val if isinstance(relu, nn.ReLU6) else None
        return cls(spec, maximum=maximum, inplace=relu.inplace, scales=scales, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        if getattr(x, "rectified", False):  # by the BatchNorm before it: fusion.py
            return self.quantizer(x)
        if self.maximum is None:
            return self.quantizer(F.relu(x, self.inplace))
        return self.quantizer(F.hardtanh(x, 0.0, self.maximum, self.inplace))

    def extra_repr(self) -> str:
        """E.g. ``maximum=6.0, inplace``."""
        words = [] if self.maximum is None else [f"maximum={self.maximum}"]
        return ", ".join(words + ["inplace"] * self.inplace)


def quantized_layers(student: nn.Module) -> dict[str, QConv2d | QLinear]:
    """Its convolutions and dense layers by name, in module order."""
    return {n: m for n, m in student.named_modules() if isinstance(m, QConv2d | QLinear)}


def _weight_quantizer(weight: Tensor, spec: QuantSpec, scales: str) -> Quantizer:
    if spec.axis not in (None, 0):
        raise InputError(f"the weight's axis must be 0 (output channels) or None, got {spec.axis}.")
    channels = 1 if spec.axis is None else weight.shape[0]
    mode = _mode(scales, minmax="dynamic")
    return Quantizer(spec, channels, mode=mode, device=weight.device)


def _input_quantizer(weight: Tensor, spec: QuantSpec | None, scales: str) -> Quantizer | None:
    return None if spec is None else per_tensor_quantizer(spec, scales, weight.device)


def per_tensor_quantizer(spec: QuantSpec, scales: str, device: Device) -> Quantizer:
    """The quantizer of an activation; ``scales`` is "learned" or "minmax"."""
    if spec.axis is not None:
        raise InputError(f"activations have one scale a tensor, got axis={spec.axis}; use None.")
    return Quantizer(spec, mode=_mode(scales, minmax="ema"), device=device)


def _mode(scales: str, *, minmax: Mode) -> Mode:
    if scales not in ("learned", "minmax"):
        raise InputError(f"scales must be learned or minmax, got {scales!r}.")
    return "learned" if scales == "learned" else minmax


def _adopt(
    quantized: Any,
    layer: nn.Conv2d | nn.Linear,
    weight_spec: QuantSpec,
    input_spec: QuantSpec | None,
    scales: str,
) -> Any:
    """``quantized``, which was made on the meta device, with the parameters of ``layer``."""
    quantized.weight, quantized.bias = layer.weight, layer.bias
    quantized.weight_quantizer = _weight_quantizer(layer.weight, weight_spec, scales)
    quantized.input_quantizer = _input_quantizer(layer.weight, input_spec, scales)
    return quantized.train(layer.training)

"""All weights of a student on their grids by one op, before its forward begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dfq.prepare.layers import QConv2d, QLinear
from dfq.prepare.quantizer import LOG_SMALLEST, Quantizer
from dfq_kernels import fake_quantize_all
from dfq_kernels.fake_quantize_all import has_rows


def quantize_weights_together(student: nn.Module) -> None:
    """Let every forward of ``student`` begin with one ``fake_quantize_all`` over its weights.

    The values are those that each layer would compute alone, and a layer called on its own still
    does: the hooks leave nothing behind when a forward ends, however it ends.
    """
    student.register_forward_pre_hook(_quantize)
    student.register_forward_hook(_forget, always_call=True)


def _quantize(student: nn.Module, args: Any) -> None:
    layers: list[Any] = [module for module in student.modules() if _joins(module)]
    if len(layers) < 2 or torch.compiler.is_compiling():
        return
    weights: list[Tensor] = [layer.weight for layer in layers]
    quantizers: list[Quantizer] = [layer.weight_quantizer for layer in layers]
    logs = [quantizer.log_scale for quantizer in quantizers]
    scales = torch._foreach_exp(torch._foreach_clamp_min(logs, LOG_SMALLEST))
    pairs = zip(quantizers, weights, strict=True)
    factors = [quantizer.gradient_factor(weight) for quantizer, weight in pairs]
    quantized = fake_quantize_all(
        weights,
        _ScaleGradients.apply(factors, *scales),
        [quantizer.zero_point for quantizer in quantizers],
        [quantizer.spec.quant_min for quantizer in quantizers],
        [quantizer.spec.quant_max for quantizer in quantizers],
    )
    for layer, weight in zip(layers, quantized, strict=True):
        layer.quantized_weight = weight


def _forget(student: nn.Module, args: Any, output: Any) -> None:
    for module in student.modules():
        if isinstance(module, QConv2d | QLinear):
            module.quantized_weight = None


def _joins(module: nn.Module) -> bool:
    if not isinstance(module, QConv2d | QLinear):
        return False
    quantizer = module.weight_quantizer
    plain = quantizer.mode == "learned" and quantizer.has_scale and not quantizer.spec.midrise
    awake = not (quantizer.bypass or quantizer.observing)
    return plain and awake and has_rows(module.weight)


class _ScaleGradients(torch.autograd.Function):
    """The identity of several tensors, with a factor on the gradient of each."""

    @staticmethod
    def forward(ctx: Any, factors: list[float], *scales: Tensor) -> tuple[Tensor, ...]:
        ctx.factors = factors
        return tuple(scale.view_as(scale) for scale in scales)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *torch._foreach_mul(grads, ctx.factors)

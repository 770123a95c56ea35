"""Channels brought to one size before they share a grid: cross-layer equalization.

A channel that is small beside the others of its tensor gets few levels of a grid that all of them
share. Between a BatchNorm and the next layer with weights its size is free to choose: what the
BatchNorm puts out smaller, the layer's weights take back, and through anything positively
homogeneous (ReLU, LeakyReLU, pooling) the network computes what it did (Nagel et al., DFQ,
arXiv:1906.04721).

Ours: only depthwise layers take a scale over, whose weights have a grid for each channel, so that
nothing is lost. And channels are not given one range, but each as much of the grid as its side of
zero has, while zero lies where the layer's outputs lose least: behind a LeakyReLU some channels
have all of their values on the one side and some on the other. MobileNetV1 x0.25, rounded to W8A8
and not trained, diverges from its teacher on crops and blends of synthetic images by 0.047 as it
is, by 0.036 with equal ranges, as its BatchNorm layers tell them, and by 0.017 so (on painted
images by 0.108, 0.108 and 0.061). Trained at W4A4 as in the recipe's ``quick`` effort, it agrees
with its teacher on 77 % of them instead of 72 % (two sets of images each; divergence 0.39 for both,
painted: 0.31 and 0.33). Cutting values off where that lowers a channel's squared error brings
nothing at W8A8 and loses at W4A4 (painted: 0.39).

A dense layer would pay with the precision of its weights: half of the ranges to its weights, as
SmoothQuant (arXiv:2211.10438) does, brought MobileNetV1 no nearer at W8A8 (0.0016 against 0.0012 on
synthetic images) and further away at W4A4 (0.49 against 0.35 behind its blocks, 0.90 against 0.59
on painted images). Nor is a channel's mean absorbed into the next layer's bias, as DFQ does: behind
a padded layer that changes the border of every image, which takes MobileNetV1 at W8A8, three
channels of its stem absorbed, from 0.057 to 0.084.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from dfq.prepare.adds import is_relu
from dfq.prepare.frozen import Frozen, evaluating
from dfq.prepare.layers import QConv2d, QReLU
from dfq.prepare.quantizer import Quantizer
from dfq.prepare.sensitivity import quantizing_only
from dfq.prepare.trace import trace

SHOWN = 64  # images
SAMPLE = 8192  # values of a channel that are looked at
SMALLEST = 1e-3  # of the largest channel; a smaller one is as good as dead

_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_PASSING = (*_POOLING, nn.Identity, nn.Dropout, nn.Dropout2d, nn.LeakyReLU)
_PASSING_CALLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "dropout")


class Pair(NamedTuple):
    """A BatchNorm, the depthwise layer that alone takes its channels in, and the grid of these."""

    norm: nn.BatchNorm2d
    layer: QConv2d
    quantizer: Quantizer


class Seen(NamedTuple):
    """Of a layer, in float."""

    inputs: Tensor  # [C, SAMPLE]
    spread: Tensor  # [outputs], variance


@torch.no_grad()
def equalize_channels(student: nn.Module, images: Tensor) -> int:
    """Scale channels of a prepared ``student``, in place; return how many pairs were scaled.

    Every channel c between a BatchNorm and a depthwise layer that alone reads it is divided by
    ``s_c``, and the layer's weights are multiplied by it: ``s_c = max(max x_c / (quant_max - z),
    -min x_c / (z - quant_min))``, the least step with which a grid with zero_point z holds all of
    it. z is the one with the least ``sum_c s_c^2 * sum w_c^2 / var y_c``: what rounding x leaves in
    the layer's outputs y, in units of their variance. Then the geometric mean of s is set to 1. The
    network computes what it did; call this before ``calibrate``, which finds scale and zero_point.
    A model whose graph cannot be told stays as it is.

    Args:
        student: from ``prepare``.
        images: [N, C, H, W], the first of which are shown; the same ones give the same scales.
    """
    pairs = list(_pairs(student))
    if pairs:
        seen = _watch(student, [pair.layer for pair in pairs], images[:SHOWN])
    for pair in pairs:
        norm, layer = pair.norm, pair.layer
        step = _steps(pair, seen[layer])
        step /= step.log().mean().exp()
        each = step.repeat_interleave(layer.out_channels // layer.in_channels)
        layer.weight.mul_(each.reshape(-1, 1, 1, 1))
        for parameter in (norm.weight, norm.bias):
            parameter.div_(step)
    return len(pairs)


def _watch(student: nn.Module, layers: list[QConv2d], images: Tensor) -> dict[nn.Module, Seen]:
    """Run ``student`` in float; the draw of what is kept has a generator of its own."""
    seen: dict[nn.Module, Seen] = {}
    rng = torch.Generator().manual_seed(0)

    def look(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        rows, answers = (x.float().transpose(0, 1).flatten(1) for x in (args[0], output))
        picks = torch.randint(rows.shape[1], (SAMPLE,), generator=rng).to(rows.device)
        seen[layer] = Seen(rows[:, picks], answers.var(1, correction=0))

    handles = [layer.register_forward_hook(look) for layer in layers]
    try:
        with evaluating(student), quantizing_only(student, None):
            student(images.to(next(student.parameters())))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _steps(pair: Pair, seen: Seen) -> Tensor:
    """[C]: a step of the grid for each channel."""
    spec = pair.quantizer.spec
    low, high = seen.inputs.aminmax(dim=1)
    # one that hardly ever passes its ReLU passes it some day, by a deviation
    high = torch.maximum(high, pair.norm.weight.float().abs())
    if spec.symmetric and not spec.signed:
        low = torch.zeros_like(low)  # such values are zero there
    codes = [0] if spec.symmetric else list(range(spec.quant_min, spec.quant_max + 1))
    zero_point = torch.tensor(codes, device=high.device)[:, None]
    steps = torch.maximum(  # [zero_points, C]
        _least_step(high, spec.quant_max - zero_point),
        _least_step(-low, zero_point - spec.quant_min),
    )
    tiny = torch.finfo(torch.float32).tiny
    steps = steps.clamp(min=SMALLEST * steps.amax(1, keepdim=True).clamp(min=tiny))
    passed = pair.layer.weight.float().square().sum((1, 2, 3)) / seen.spread
    # an output that does not change tells the layers behind it nothing
    passed = passed.where(seen.spread > SMALLEST**2 * seen.spread.max(), 0.0)
    lost = (steps.square() * passed.reshape(len(high), -1).mean(1)).sum(1)  # [zero_points]
    return steps[lost.nan_to_num(nan=torch.inf).argmin()]


def _least_step(extent: Tensor, codes: Tensor) -> Tensor:
    """With which ``codes`` hold ``extent``: 0 if there is nothing to hold, infinite if no code."""
    return (extent.clamp(min=0) / codes).nan_to_num(nan=0.0, posinf=torch.inf)


def _pairs(student: nn.Module) -> Iterator[Pair]:
    """Every BatchNorm whose one way on ends in a depthwise layer; each module of it used once."""
    graph, modules = trace(student), dict(student.named_modules())
    nodes = list(graph.nodes) if graph else []
    calls = [node.target for node in nodes if node.op == "call_module"]
    for node in nodes:
        norm, quantizer = _module(node, modules), None
        once = calls.count(node.target) == 1
        if not (once and isinstance(norm, nn.BatchNorm2d) and isinstance(norm, Frozen)):
            continue
        if not norm.affine:
            continue
        while len(node.users) == 1:
            (node,) = node.users
            module = _module(node, modules)
            if isinstance(module, QConv2d) and module.groups == module.in_channels > 1:
                quantizer = module.input_quantizer or quantizer
                if quantizer and calls.count(node.target) == 1:
                    yield Pair(norm, module, quantizer)
                break
            if not _passes(node, modules):
                break
            if isinstance(module, QReLU):
                quantizer = module.quantizer


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _passes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a scale passes through the step."""
    module = _module(node, modules)
    if isinstance(module, QReLU):
        return module.maximum is None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    called = node.op != "call_module" and name in _PASSING_CALLS
    return called or is_relu(node, modules) or isinstance(module, _PASSING)

"""Channels brought to one size before they share a grid: cross-layer equalization.

A channel that is small beside the others of its tensor gets few levels of a grid that all of them
share. Between a BatchNorm and the next layer with weights its size is free to choose: what the
BatchNorm puts out smaller, the layer's weights take back, and through anything positively
homogeneous (ReLU, LeakyReLU, pooling) the network computes what it did (Nagel et al., DFQ,
arXiv:1906.04721). The range of a channel is known without data, since its BatchNorm says mean and
deviation.

Ours: the ranges are of activations, not of weights, and only depthwise layers take them over. Their
weights have a grid for each channel, so that nothing is lost. A dense layer pays with the precision
of its weights: half of the ranges to its weights, as SmoothQuant (arXiv:2211.10438) does, brought
MobileNetV1 x0.25 no nearer at W8A8 (divergence 0.0016 against 0.0012 on synthetic images) and
further away at W4A4 (0.49 against 0.35 behind its blocks, 0.90 against 0.59 on painted images).

Nor is a channel's mean absorbed into the next layer's bias, as DFQ does: behind a padded layer that
changes the border of every image, which takes MobileNetV1 at W8A8, three channels of its stem
absorbed, from 0.057 to 0.084, although those channels are what 8 bits cost it most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfq.prepare.adds import is_relu
from dfq.prepare.frozen import Frozen
from dfq.prepare.layers import QConv2d, QReLU
from dfq.prepare.trace import trace

DEVIATIONS = 3.0  # of a channel from its mean that count as its range
SMALLEST = 1e-3  # of the largest range; below it a channel is as good as dead

_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_PASSING = (*_POOLING, nn.Identity, nn.Dropout, nn.Dropout2d)
_PASSING_CALLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "dropout")


class Pair(NamedTuple):
    """A BatchNorm, what follows it alone, and the depthwise layer that takes the channels in."""

    norm: nn.BatchNorm2d
    activations: tuple[Callable[[Tensor], Tensor], ...]
    layer: QConv2d


@torch.no_grad()
def equalize_channels(student: nn.Module) -> int:
    """Scale channels of a prepared ``student``, in place; return how many pairs were scaled.

    For every channel c between a BatchNorm and a depthwise layer that alone reads it, ``s_c`` is
    the largest magnitude within three deviations of its mean, behind the activation, but at least
    one deviation (a channel that hardly ever passes its ReLU passes it some day). With the
    geometric mean of s at 1 the BatchNorm's output is divided by s and the layer's weights are
    multiplied by it. The network computes what it did; call this before ``calibrate``. A model
    whose graph cannot be told stays as it is.
    """
    pairs = list(_pairs(student))
    for pair in pairs:
        scale = _scale(pair)
        layer = pair.layer
        each = scale.repeat_interleave(layer.out_channels // layer.in_channels)
        layer.weight.mul_(each.reshape(-1, 1, 1, 1))
        for parameter in (pair.norm.weight, pair.norm.bias):
            parameter.div_(scale)
    return len(pairs)


def _scale(pair: Pair) -> Tensor:
    """[channels], of geometric mean 1."""
    deviation = pair.norm.weight.abs()
    low = pair.norm.bias - DEVIATIONS * deviation
    high = pair.norm.bias + DEVIATIONS * deviation
    for activation in pair.activations:
        low, high = activation(low), activation(high)
    scale = torch.stack((low.abs(), high.abs(), deviation)).amax(0)
    tiny = torch.finfo(scale.dtype).tiny
    scale = scale.clamp(min=SMALLEST * float(scale.max().clamp(min=tiny)))
    return scale / scale.log().mean().exp()


def _pairs(student: nn.Module) -> Iterator[Pair]:
    """Every BatchNorm whose one way on ends in a depthwise layer; each module of it used once."""
    graph, modules = trace(student), dict(student.named_modules())
    nodes = list(graph.nodes) if graph else []
    calls = [node.target for node in nodes if node.op == "call_module"]
    for node in nodes:
        norm = _module(node, modules)
        once = calls.count(node.target) == 1
        if not (once and isinstance(norm, nn.BatchNorm2d) and isinstance(norm, Frozen)):
            continue
        if not norm.affine:
            continue
        activations: list[Callable[[Tensor], Tensor]] = []
        while len(node.users) == 1:
            (node,) = node.users
            layer, activation = _module(node, modules), _activation(node, modules)
            if isinstance(layer, QConv2d) and layer.groups == layer.in_channels > 1:
                if calls.count(node.target) == 1:
                    yield Pair(norm, tuple(activations), layer)
                break
            if activation is None:
                break
            activations.append(activation)


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> Callable[[Tensor], Tensor] | None:
    """What the step does to each value; None if a scale does not pass through it."""
    module = _module(node, modules)
    if isinstance(module, QReLU):
        return F.relu if module.maximum is None else None
    if is_relu(node, modules):
        return F.relu
    if isinstance(module, nn.LeakyReLU):
        return lambda x: F.leaky_relu(x, module.negative_slope)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    passes = node.op != "call_module" and name in _PASSING_CALLS
    return (lambda x: x) if passes or isinstance(module, _PASSING) else None

"""Channels brought to one size before they share a grid: cross-layer equalization.

A channel that is small beside the others of its tensor gets few levels of a grid that all of them
share. Between a BatchNorm and the next layer with weights its size is free to choose: what the
BatchNorm puts out smaller, the layer's weights take back, and through anything positively
homogeneous (ReLU, LeakyReLU, pooling) the network computes what it did (Nagel et al., DFQ,
arXiv:1906.04721). The range of a channel is known without data, since its BatchNorm says mean and
deviation. Ours: the ranges are of activations, not of weights, whose grids
are per channel here anyway, and half of them goes into the weights of a dense layer, as
SmoothQuant (arXiv:2211.10438) does in transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfq.prepare.adds import is_relu
from dfq.prepare.frozen import Frozen
from dfq.prepare.layers import QConv2d, QLinear, QReLU
from dfq.prepare.trace import trace

DEVIATIONS = 3.0  # of a channel from its mean that count as its range
SMALLEST = 1e-3  # of the largest range and weight; below it a channel is as good as dead

_POOLING = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_PASSING = (*_POOLING, nn.Identity, nn.Dropout, nn.Dropout2d, nn.Flatten)
_PASSING_CALLS = ("flatten", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "dropout")


class Pair(NamedTuple):
    """A BatchNorm, what follows it alone, and the layer that takes the channels in."""

    norm: nn.BatchNorm2d
    activations: tuple[Callable[[Tensor], Tensor], ...]
    layer: QConv2d | QLinear


@torch.no_grad()
def equalize_channels(student: nn.Module) -> int:
    """Scale channels of a prepared ``student``, in place; return how many pairs were scaled.

    For every channel c between a BatchNorm and a layer that alone reads it, with r_c the largest
    magnitude within three deviations of its mean, behind the activation, but at least one deviation
    (a channel that hardly ever passes its ReLU passes it some day), and w_c that of the layer's
    weights for c:

    - the layer is depthwise, so that its grid is per channel: ``s_c = r_c``, at no cost;
    - it is dense: ``s_c = sqrt(r_c / w_c)``, half of the difference into its weights.

    With the geometric mean of s at 1 the BatchNorm's output is divided by s and the weights are
    multiplied by it. The network computes what it did; call this before ``calibrate``. A model
    whose graph cannot be told stays as it is.
    """
    pairs = list(_pairs(student))
    for pair in pairs:
        scale = _scale(pair)
        weight = pair.layer.weight
        shape = [1] * weight.ndim
        shape[0 if _is_depthwise(pair.layer) else 1] = -1
        weight.mul_(scale.reshape(shape))
        for parameter in (pair.norm.weight, pair.norm.bias):
            parameter.div_(scale)
    return len(pairs)


def _scale(pair: Pair) -> Tensor:
    """[channels], of geometric mean 1."""
    norm, weight = pair.norm, pair.layer.weight
    deviation = norm.weight.abs()
    low, high = norm.bias - DEVIATIONS * deviation, norm.bias + DEVIATIONS * deviation
    for activation in pair.activations:
        low, high = activation(low), activation(high)
    scale = _floored(torch.stack((low.abs(), high.abs(), deviation)).amax(0))
    if not _is_depthwise(pair.layer):
        largest = weight.abs().transpose(0, 1).flatten(1).amax(1)
        scale = (scale / _floored(largest)).sqrt()
    return scale / scale.log().mean().exp()


def _floored(sizes: Tensor) -> Tensor:
    return sizes.clamp(min=SMALLEST * float(sizes.max().clamp(min=torch.finfo(sizes.dtype).tiny)))


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, QConv2d) and layer.groups == layer.in_channels > 1


def _pairs(student: nn.Module) -> Iterator[Pair]:
    """Every BatchNorm with one way on, up to a layer; each module of it used once."""
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
            if isinstance(layer, QConv2d | QLinear):
                if calls.count(node.target) == 1 and _takes(layer, norm.num_features):
                    yield Pair(norm, tuple(activations), layer)
                break
            if activation is None:
                break
            activations.append(activation)


def _takes(layer: QConv2d | QLinear, channels: int) -> bool:
    """Whether the second dimension of its weight, or of a depthwise one the first, is channels."""
    if isinstance(layer, QLinear):
        return layer.in_features == channels  # more: a flattened map, several features a channel
    return layer.groups == 1 or _is_depthwise(layer)


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

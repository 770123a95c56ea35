"""BatchNorms whose channels a depthwise layer alone takes in, so that their sizes are free.

Between a BatchNorm and the next layer with weights a channel may have any size: what the BatchNorm
puts out smaller, the layer's weights take back, and through anything positively homogeneous (ReLU,
LeakyReLU, pooling) the network computes what it did (Nagel et al., DFQ, arXiv:1906.04721).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfq.depthwise import is_depthwise
from dfq.hooks import removing
from dfq.prepare.adds import calls, is_relu
from dfq.prepare.frozen import Frozen, evaluating
from dfq.prepare.layers import QConv2d, QReLU
from dfq.prepare.quantizer import Quantizer
from dfq.prepare.sensitivity import quantizing_only
from dfq.prepare.trace import trace

SHOWN = 64  # images
SAMPLE = 8192  # values of a channel that are looked at
SMALLEST = 1e-3  # of the largest channel; a smaller one is as good as dead

_LARGEST = (F.max_pool2d, F.adaptive_max_pool2d, torch.max_pool2d)
_LARGEST_MODULES = (nn.MaxPool2d, nn.AdaptiveMaxPool2d)
_LINEAR = (F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, F.dropout2d, torch.dropout)
_LINEAR_MODULES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Dropout, nn.Dropout2d)


def some(images: Tensor) -> Tensor:
    """At most ``SHOWN`` of them, spread over all."""
    return images[:: -(-len(images) // SHOWN)]


class Pair(NamedTuple):
    """A BatchNorm, the depthwise layer that alone takes its channels in, and their grid."""

    norm: nn.BatchNorm2d
    layer: QConv2d
    quantizer: Quantizer
    slope: float = 0.0  # times which values below zero pass; 0 if their sign cannot be turned

    def scale(self, before: Tensor, behind: Tensor) -> None:
        """Multiply each channel of what the BatchNorm puts out, and the layer's weights for it."""
        for parameter in (self.norm.weight, self.norm.bias):
            parameter.mul_(before)
        weight, groups = self.layer.weight, self.layer.groups
        each = behind.reshape(groups, 1, -1).expand(-1, len(weight) // groups, -1)
        weight.mul_(each.reshape(len(weight), -1, 1, 1))


class Seen(NamedTuple):
    """Of a layer, in float."""

    inputs: Tensor  # [C, SAMPLE]
    spread: Tensor  # [outputs], variance

    def gain(self, weight: Tensor) -> Tensor:
        """[outputs, inputs of a group]: squared weights, over the variance of what they lead to.

        What a change of an input does to the outputs, in units of their variance. An output that
        does not change tells the layers behind it nothing.
        """
        squares = weight.float().square().sum((2, 3)) / self.spread[:, None]
        return squares.where(self.spread[:, None] > SMALLEST**2 * self.spread.max(), 0.0)


def find_pairs(student: nn.Module) -> list[Pair]:
    """Every BatchNorm whose one way on ends in a depthwise layer; each module of it used once.

    None are found where the graph cannot be told.
    """
    return list(_pairs(student))


def _pairs(student: nn.Module) -> Iterator[Pair]:
    graph, modules = trace(student), dict(student.named_modules())
    nodes = list(graph.nodes) if graph else []
    calls = [node.target for node in nodes if node.op == "call_module"]
    for node in nodes:
        norm, quantizer, slope = _module(node, modules), None, 1.0
        once = calls.count(node.target) == 1
        if not (once and isinstance(norm, nn.BatchNorm2d) and isinstance(norm, Frozen)):
            continue
        if not norm.affine:
            continue
        while len(node.users) == 1:
            (node,) = node.users
            module = _module(node, modules)
            if isinstance(module, QConv2d) and is_depthwise(module):
                quantizer = module.input_quantizer or quantizer
                if quantizer and calls.count(node.target) == 1:
                    yield Pair(norm, module, quantizer, slope)
                break
            step = _slope(node, modules)
            if step is None:
                break
            slope *= step
            if isinstance(module, QReLU):
                quantizer = module.quantizer


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _slope(node: fx.Node, modules: dict[str, nn.Module]) -> float | None:
    """Times which the step lets values below zero pass: None if it is not positively homogeneous.

    0 too where it would choose others if their signs were turned.
    """
    module = _module(node, modules)
    if isinstance(module, QReLU):
        return 0.0 if module.maximum is None else None
    if isinstance(module, nn.LeakyReLU):
        return max(module.negative_slope, 0.0)
    if is_relu(node, modules) or isinstance(module, _LARGEST_MODULES) or calls(node, _LARGEST):
        return 0.0
    return 1.0 if isinstance(module, _LINEAR_MODULES) or calls(node, _LINEAR) else None


def watch(student: nn.Module, images: Tensor) -> list[tuple[Pair, Seen]]:
    """``find_pairs``, and what each sees when ``student`` runs on the first images, in float.

    The draw of what is kept has a generator of its own.
    """
    pairs = find_pairs(student)
    if not pairs:
        return []
    seen: dict[nn.Module, Seen] = {}
    rng = torch.Generator().manual_seed(0)

    def look(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        rows, answers = (x.float().transpose(0, 1).flatten(1) for x in (args[0], output))
        picks = torch.randint(rows.shape[1], (SAMPLE,), generator=rng).to(rows.device)
        seen[layer] = Seen(rows[:, picks], answers.var(1, correction=0))

    hooks = removing(pair.layer.register_forward_hook(look) for pair in pairs)
    with hooks, evaluating(student), quantizing_only(student, None):
        student(images[:SHOWN].to(next(student.parameters())))
    return [(pair, seen[pair.layer]) for pair in pairs]

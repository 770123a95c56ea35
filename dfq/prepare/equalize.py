"""Channels brought to one size before they share a grid: cross-layer equalization.

A channel that is small beside the others of its tensor gets few levels of a grid that all of them
share. Between a BatchNorm and the next layer with weights its size is free to choose: what the
BatchNorm puts out smaller, the layer's weights take back, and through anything positively
homogeneous (ReLU, LeakyReLU, pooling) the network computes what it did (Nagel et al., DFQ,
arXiv:1906.04721).

Ours: only depthwise layers take a scale over, whose weights have a grid for each channel, so that
nothing is lost. And channels are not given one range, but each as much of the grid as its side of
zero has, while zero lies where the layer's outputs lose least: behind a LeakyReLU some channels
have all of their values on the one side and some on the other. A channel that lies below zero
altogether is turned over first: where the LeakyReLU is a line, its slope and a sign can be taken
into the layers around it, and no side of the grid has to be kept for it. MobileNetV1 x0.25, rounded
to W8A8 and not trained, diverges from its teacher on crops and blends of synthetic images by 0.047
as it is, by 0.036 with equal ranges, as its BatchNorm layers tell them, by 0.016 with a side each,
and by 0.011 with two of its stem's eight channels turned over (on painted images by 0.108, 0.108,
0.063 and 0.051). Trained at W4A4 as in the recipe's ``quick`` effort, with sides but none turned,
it agrees with its teacher on 77 % of them instead of 72 % (two sets of images each; divergence 0.39
for both, painted: 0.31 and 0.33). Cutting values off where that lowers a channel's squared error
brings nothing at W8A8 and loses at W4A4 (painted: 0.39).

A dense layer would pay with the precision of its weights: half of the ranges to its weights, as
SmoothQuant (arXiv:2211.10438) does, brought MobileNetV1 no nearer at W8A8 (0.0016 against 0.0012 on
synthetic images) and further away at W4A4 (0.49 against 0.35 behind its blocks, 0.90 against 0.59
on painted images); the share with the least predicted noise of inputs and weights together brought
it no nearer either (W4A4, trained: 0.36 against 0.36, painted 0.40 against 0.36). Nor is a
channel's mean absorbed into the next layer's bias, as DFQ does: behind a padded layer that changes
the border of every image, which takes MobileNetV1 at W8A8, three channels of its stem absorbed,
from 0.057 to 0.084.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfq.depthwise import is_depthwise
from dfq.prepare.adds import calls, is_relu
from dfq.prepare.frozen import Frozen, evaluating
from dfq.prepare.layers import QConv2d, QReLU
from dfq.prepare.quantizer import Quantizer
from dfq.prepare.sensitivity import quantizing_only
from dfq.prepare.trace import trace

SHOWN = 64  # images
SAMPLE = 8192  # values of a channel that are looked at
SMALLEST = 1e-3  # of the largest channel; a smaller one is as good as dead
FAR = 3.0  # deviations of a BatchNorm's output, that are as good as all of it; as DFQ has it

_LARGEST = (F.max_pool2d, F.adaptive_max_pool2d, torch.max_pool2d)
_LARGEST_MODULES = (nn.MaxPool2d, nn.AdaptiveMaxPool2d)
_LINEAR = (F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout, F.dropout2d, torch.dropout)
_LINEAR_MODULES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Identity, nn.Dropout, nn.Dropout2d)


class Pair(NamedTuple):
    """A BatchNorm, the depthwise layer that alone takes its channels in, and the grid of these."""

    norm: nn.BatchNorm2d
    layer: QConv2d
    quantizer: Quantizer
    slope: float = 0.0  # times which values below zero pass; 0 if their sign cannot be turned


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
    the layer's outputs y, in units of their variance. Then the geometric mean of s is set to 1.
    Before, a channel whose values and whose BatchNorm's mean plus ``FAR`` deviations are below zero
    is turned over, if only a LeakyReLU of slope a and averages lie between: times -a in front of it
    and -1 behind. The network computes what it did, but for values of such a channel that are above
    zero all the same; call this before ``calibrate``, which finds scale and zero_point. A model
    whose graph cannot be told stays as it is.

    Args:
        student: from ``prepare``.
        images: [N, C, H, W], the first of which are shown; the same ones give the same scales.
    """
    pairs = list(_pairs(student))
    if not pairs:
        return 0
    seen = _watch(student, [pair.layer for pair in pairs], images[:SHOWN])
    for pair in pairs:
        step = _steps(pair, _turn(pair, seen[pair.layer]))
        step /= step.log().mean().exp()
        _scale(pair, 1 / step, step)
    return len(pairs)


def _scale(pair: Pair, before: Tensor, behind: Tensor) -> None:
    """Multiply each channel of what the BatchNorm puts out, and the layer's weights for it."""
    for parameter in (pair.norm.weight, pair.norm.bias):
        parameter.mul_(before)
    each = behind.repeat_interleave(pair.layer.out_channels // pair.layer.in_channels)
    pair.layer.weight.mul_(each.reshape(-1, 1, 1, 1))


def _turn(pair: Pair, seen: Seen) -> Seen:
    """Turn channels over that lie below zero; return what is seen then."""
    norm = pair.norm
    below = (seen.inputs.amax(1) < 0) & (norm.bias + FAR * norm.weight.abs() < 0)
    below &= pair.slope > 0
    sign = torch.where(below, -1.0, 1.0)
    _scale(pair, torch.where(below, -pair.slope, 1.0), sign)
    return Seen(seen.inputs * sign[:, None], seen.spread)


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

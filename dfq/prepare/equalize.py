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
it no nearer either (W4A4, trained: 0.36 against 0.36, painted 0.40 against 0.36). What helps with
many bits is to size all channels of a network together, see ``dfq.prepare.sizes``. Nor is a
channel's mean absorbed into the next layer's bias, as DFQ does: behind a padded layer that changes
the border of every image, which takes MobileNetV1 at W8A8, three channels of its stem absorbed,
from 0.057 to 0.084.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dfq.prepare.pairs import SMALLEST, Pair, Seen, watch

FAR = 3.0  # deviations of a BatchNorm's output, that are as good as all of it; as DFQ has it


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
    watched = watch(student, images)
    for pair, seen in watched:
        step = _steps(pair, _turn(pair, seen))
        step /= step.log().mean().exp()
        pair.scale(1 / step, step)
    return len(watched)


def _turn(pair: Pair, seen: Seen) -> Seen:
    """Turn channels over that lie below zero; return what is seen then."""
    norm = pair.norm
    below = (seen.inputs.amax(1) < 0) & (norm.bias + FAR * norm.weight.abs() < 0)
    below &= pair.slope > 0
    sign = torch.where(below, -1.0, 1.0)
    pair.scale(torch.where(below, -pair.slope, 1.0), sign)
    return Seen(seen.inputs * sign[:, None], seen.spread)


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
    passed = seen.gain(pair.layer.weight).reshape(len(high), -1).mean(1)
    lost = (steps.square() * passed).sum(1)  # [zero_points]
    return steps[lost.nan_to_num(nan=torch.inf).argmin()]


def _least_step(extent: Tensor, codes: Tensor) -> Tensor:
    """With which ``codes`` hold ``extent``: 0 if there is nothing to hold, infinite if no code."""
    return (extent.clamp(min=0) / codes).nan_to_num(nan=0.0, posinf=torch.inf)

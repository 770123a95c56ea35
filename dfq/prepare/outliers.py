"""Channels of a dense layer's input that are larger than the rest, shrunk.

One grid for all channels has steps for the largest of them: in FastestDet the input of one layer
has a channel eleven times as large as half of the others. What is taken from such a channel its
layer's weights take back (as in SmoothQuant, arXiv:2211.10438), and pay for it: a row of weights
has one scale, which grows with its largest weight. Ours is how much: no channel is left larger than
a bound, and the bound is the one with the least predicted noise of inputs and weights together.

It serves many bits. Trained at W8A8 as in the recipe's ``quick`` effort, on the same images,
MobileNetV1 x0.25 diverges from its teacher on crops and blends of synthetic images by 0.0065
instead of 0.0077, on images inverted from a detector by 0.017 instead of 0.020, on painted ones by
0.022 instead of 0.023; FastestDet lies 0.0295 from its teacher on images of another seed, instead
of 0.0334. ResNet-20, which has no such channels, rounded and not trained, diverges by 0.0058
instead of 0.0053 at W8A8 and by 0.0079 instead of 0.0086 at W7A7. With few bits it brings nothing:
at W4A4, rounded and not trained, FastestDet lies 0.251 from its teacher with and without it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dfq.prepare.layers import QConv2d
from dfq.prepare.pairs import SMALLEST, Pair, Seen, watch

BOUNDS = 33  # how many are tried, from the largest channel to the smallest


@torch.no_grad()
def shrink_outliers(student: nn.Module, images: Tensor) -> int:
    """Shrink channels of a prepared ``student``, in place; return how many pairs were looked at.

    Every channel c between a BatchNorm and a convolution of one group that alone reads it is
    divided by ``s_c = max(1, max |x_c| / bound)``, and the layer's weights are multiplied by it.
    The bound is the one with the least, summed over the outputs o of the layer, ::

        (step^2 * sum_c s_c^2 * |w_oc|^2 + step_o^2 * K * sum_c E[x_c^2] / s_c^2) / var y_o

    twelve times the variance that rounding leaves in them: ``step`` is that of the grid that holds
    all ``x_c / s_c``, ``step_o`` that of the row of weights ``w_oc s_c``, K the kernel's positions.
    The network computes what it did; call this before ``calibrate``. A model whose graph cannot be
    told stays as it is.

    Args:
        student: from ``prepare``.
        images: [N, C, H, W], the first of which are shown; the same ones give the same scales.
    """
    watched = watch(student, _is_dense, images)
    for pair, seen in watched:
        sizes = _sizes(pair, seen)
        pair.scale(1 / sizes, sizes)
    return len(watched)


def _is_dense(layer: QConv2d) -> bool:
    return layer.groups == 1


def _sizes(pair: Pair, seen: Seen) -> Tensor:
    """[C]: what each channel is divided by."""
    largest = seen.inputs.abs().amax(1)
    top = largest.max()
    if not 0 < top < math.inf:
        return torch.ones_like(largest)
    largest = largest.clamp(min=SMALLEST * top)
    ways = torch.linspace(0, 1, BOUNDS, device=top.device)
    bounds = torch.lerp(top.log(), largest.min().log(), ways).exp()
    tried = [(largest / bound).clamp(min=1) for bound in bounds]
    return min(tried, key=lambda sizes: _noise(pair, seen, sizes))


def _noise(pair: Pair, seen: Seen, sizes: Tensor) -> float:
    """Of the outputs, in units of their variance, times twelve."""
    weight = pair.layer.weight * sizes[:, None, None]
    step = _step(pair, seen.inputs / sizes[:, None])
    row_step = weight.abs().amax((1, 2, 3), keepdim=True)
    row_step /= pair.layer.weight_quantizer.spec.quant_max
    power = seen.inputs.square().mean(1) / sizes.square()
    of_weights = seen.gain(row_step.expand_as(weight)) * power
    return float(step**2 * seen.gain(weight).sum() + of_weights.sum())


def _step(pair: Pair, inputs: Tensor) -> float:
    """Of the grid that holds all of them."""
    spec = pair.quantizer.spec
    low, high = min(0.0, float(inputs.min())), max(0.0, float(inputs.max()))
    if spec.symmetric:  # the larger side counts twice, or values below zero are zero
        high = max(high, -low) if spec.signed else high
        low = -high if spec.signed else 0.0
    return (high - low) / (spec.quant_max - spec.quant_min)

"""Weights rounded so that their errors cancel: SQuant (Guo et al., ICLR 2022, arXiv:2202.07471).

To the nearest, every weight is at most half a step off, but the errors of a channel's many weights
add up, and its outputs move. Without data, a Hessian that is unknown but for its structure says
what to prefer: errors that sum to nothing over each kernel, and over each output channel. A few
weights, those that were nearly rounded the other way, are enough for that.

From the paper's algorithm; its code was not used. The grid is that of the prepared student.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dfq.prepare.grid import align
from dfq.prepare.layers import QConv2d, QLinear, quantized_layers
from dfq.types import InputError


@torch.no_grad()
def balance_rounding(student: nn.Module) -> None:
    """Round the weights of every quantized layer by ``balanced_codes``, in place.

    They then lie on their grids, so that their quantizers give exactly them.

    Raises:
        InputError: if a weight has no scale yet.
    """
    for layer in quantized_layers(student).values():
        round_weights(layer, balanced_codes)


@torch.no_grad()
def round_weights(layer: QConv2d | QLinear, choose: Callable[[Tensor, int, int], Tensor]) -> None:
    """Put a layer's weights on their grid, in place.

    Args:
        layer: with its scales set.
        choose: the weights in steps of the grid [O, I, K], quant_min, quant_max -> their codes.

    Raises:
        InputError: if they are not.
    """
    weight, quantizer = layer.weight, layer.weight_quantizer
    spec = quantizer.spec
    if not quantizer.has_scale:
        raise InputError("the weights have no scales yet; call calibrate first.")
    scale, zero_point = (align(p, weight, spec) for p in quantizer.qparams(weight))
    offset = (0.5 if spec.midrise else 0.0) - zero_point
    steps = (weight.float() / scale - offset).reshape(*weight.shape[:2], -1)
    codes = choose(steps, spec.quant_min, spec.quant_max)
    weight.copy_((codes.reshape(weight.shape) + offset) * scale)


def balanced_codes(steps: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Integers near ``steps`` whose errors nearly cancel over each kernel and each channel.

    1. Round to the nearest in ``[quant_min, quant_max]``.
    2. Where the errors of a kernel sum to ``e``, move its ``round(|e|)`` largest errors of that
       sign one step to the other side: its sum is then at most 1/2.
    3. Where the sums of a channel's kernels sum to ``e``, do so with one weight in each of the
       ``round(|e|)`` kernels whose sums are largest: the channel's sum is then at most 1/2, that of
       each kernel at most 1.

    Where the end of the grid leaves too few to move, sums stay larger.

    Args:
        steps: [O, I, K], weights of output channel, input channel and kernel, in steps of the grid.
        quant_min: smallest code.
        quant_max: largest code.

    Returns:
        [O, I, K], float holding integers; below the ends of the grid at most 1 from ``steps``.
    """
    codes = steps.round().clamp(quant_min, quant_max)
    errors = codes - steps
    excess = errors.sum(2, keepdim=True)
    gains = _gains(codes, errors, excess.sign(), quant_min, quant_max)
    moved = (_rank(gains) < excess.abs().round()) & (gains > 0)
    codes = codes - moved * excess.sign()

    errors = codes - steps
    by_kernel = errors.sum(2)
    excess = by_kernel.sum(1, keepdim=True)
    gains = _gains(codes, errors, excess.sign()[:, :, None], quant_min, quant_max)
    best = _rank(gains) == 0
    offers = torch.where(gains.amax(2) > 0, by_kernel * excess.sign(), -torch.inf)
    chosen = (_rank(offers) < excess.abs().round()) & offers.isfinite()
    return codes - (best & chosen[:, :, None]) * excess.sign()[:, :, None]


def _gains(codes: Tensor, errors: Tensor, sign: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The errors of ``sign``, made positive; 0 for what cannot move against it."""
    inside = (codes - sign >= quant_min) & (codes - sign <= quant_max)
    return (errors * sign).clamp(min=0) * inside


def _rank(values: Tensor) -> Tensor:
    """The place of each value along the last dimension, the largest first, the first of equals."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)

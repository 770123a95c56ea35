"""GENIE-M's weight quantizer (arXiv:2212.04780): scale and rounding learned together.

Built from the description of the released code. The paper's: the frozen base, the rectified
sigmoid (AdaRound, arXiv:2004.10568) and its regularizer, hard rounding in the end. Ours: the scale
is learned by its logarithm, as everywhere here, and the grid is that of the prepared student
(symmetric, with two bits midrise; theirs is asymmetric).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dfq.prepare.grid import align
from dfq.prepare.layers import QConv2d, QLinear
from dfq.prepare.quantizer import LOG_SMALLEST, Quantizer
from dfq.types import InputError

LOW, HIGH = -0.1, 1.1  # the sigmoid's range before it is cut to 0..1; AdaRound, equation 23


class SoftRounding(nn.Module):
    """Stands in for a weight's quantizer while its rounding is learned.

    ``w^ = s * (clip(B + h(V), quant_min, quant_max) - z)`` (midrise: ``+ 1/2``) with the integers
    ``B = floor(w / s_0) + z`` frozen at the initial scale ``s_0``: moving ``s`` then moves no base,
    so that ``s`` and ``V`` can be learned together. ``h(V) = clip(1.2 * sigmoid(V) - 0.1, 0, 1)``
    starts at the fraction that ``floor`` cut off, so that ``w^ = w`` inside the grid.

    Args:
        weight: what is rounded; not changed.
        quantizer: its own, calibrated, with learned scale; its ``log_scale`` is learned on.

    Raises:
        InputError: if the quantizer's scale is not learned, or not there yet.
    """

    mode, bypass, observing, has_scale = "rounding", False, False, True

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        super().__init__()
        if quantizer.mode != "learned":
            raise InputError(
                f"soft rounding learns scales, but this quantizer's mode is {quantizer.mode!r}; "
                "prepare the student with scales='learned'."
            )
        scale, zero_point = quantizer.qparams(weight)
        self.spec, self.log_scale = quantizer.spec, quantizer.log_scale
        self.offset = 0.5 if self.spec.midrise else 0.0
        self.zero_point: Tensor
        self.register_buffer("zero_point", align(zero_point, weight, self.spec))
        with torch.no_grad():
            codes = weight.float() / align(scale, weight, self.spec) - self.offset + self.zero_point
            self.base = codes.floor()
            self.logits = nn.Parameter(_logit(codes - self.base))

    def forward(self, weight: Tensor) -> Tensor:
        """The softly rounded weight; of ``weight`` itself only the dtype counts."""
        return self._value(self.share()).to(weight.dtype)

    def share(self) -> Tensor:
        """``h(V)``: how much of a step up each code gets, 0 to 1."""
        return (torch.sigmoid(self.logits) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)

    def penalty(self, beta: float) -> Tensor:
        """``sum(1 - |2 h(V) - 1|**beta)``: zero where every rounding is decided; []."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weight with every rounding decided: up where ``h(V)`` is at least 1/2."""
        return self._value((self.share() >= 0.5).float())

    def _value(self, share: Tensor) -> Tensor:
        spec = self.spec
        codes = (self.base + share).clamp(spec.quant_min, spec.quant_max)
        scale = self.log_scale.clamp(min=LOG_SMALLEST).exp()
        return (codes - self.zero_point + self.offset) * align(scale, codes, spec)


@contextmanager
def soft_rounding(layers: Sequence[QConv2d | QLinear]) -> Iterator[list[SoftRounding]]:
    """Within, the weights of ``layers`` are rounded softly; afterwards they are rounded hard.

    The layers then have their own quantizers again, with the scales learned meanwhile, and weights
    that lie on the grid, so that these quantizers give exactly them. After an exception the weights
    are what they were.
    """
    quantizers = [layer.weight_quantizer for layer in layers]
    pairs = zip(layers, quantizers, strict=True)
    soft = [SoftRounding(layer.weight, quantizer) for layer, quantizer in pairs]
    _install(layers, soft)
    try:
        yield soft
        with torch.no_grad():
            for layer, rounding, quantizer in zip(layers, soft, quantizers, strict=True):
                layer.weight.copy_(quantizer(rounding.hard().to(layer.weight.dtype)))
    finally:
        _install(layers, quantizers)


def _install(layers: Sequence[QConv2d | QLinear], quantizers: Sequence[nn.Module]) -> None:
    for layer, quantizer in zip(layers, quantizers, strict=True):
        layer.weight_quantizer = quantizer  # type: ignore[assignment]


def _logit(share: Tensor) -> Tensor:
    """The ``V`` whose ``h(V)`` is ``share``."""
    sigmoid = (share - LOW) / (HIGH - LOW)
    return (sigmoid / (1 - sigmoid)).log()

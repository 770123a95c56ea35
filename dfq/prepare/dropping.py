"""QDrop (arXiv:2203.05740): while a student learns, single activations stay float at random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dfq.prepare.layers import quantized_layers
from dfq.prepare.quantizer import Quantizer


def activation_quantizers(module: nn.Module) -> list[Quantizer]:
    """Every quantizer of ``module`` that is not a weight's."""
    weights = {layer.weight_quantizer for layer in quantized_layers(module).values()}
    return [m for m in module.modules() if isinstance(m, Quantizer) and m not in weights]


@contextmanager
def dropping(
    module: nn.Module, probability: float, rng: torch.Generator
) -> Iterator[Callable[[], None]]:
    """Within, each activation that ``module`` quantizes stays float with ``probability``.

    What is yielded draws anew which ones; call it before every step. ``rng`` is a CPU generator;
    the same one gives the same elements on every device.
    """
    quantizers = activation_quantizers(module) if probability else []

    def redraw() -> None:
        for quantizer in quantizers:
            seed = torch.randint(2**62, (1,), generator=rng)
            quantizer.seed = seed.to(quantizer.zero_point.device, non_blocking=True)

    redraw()
    for quantizer in quantizers:
        quantizer.drop = probability
    try:
        yield redraw
    finally:
        for quantizer in quantizers:
            quantizer.drop, quantizer.seed = 0.0, None

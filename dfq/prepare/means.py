"""What quantizers did to the means of channels, taken back: bias correction.

Rounding errors do not average out: each channel's mean moves, and everything behind is off. The
BatchNorm that follows can take it back, exactly so for the images at hand (Nagel et al., DFQ,
arXiv:1906.04721, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dfq.prepare.frozen import Frozen, evaluating
from dfq.prepare.pairs import SHOWN
from dfq.prepare.sensitivity import quantizing_only


@torch.no_grad()
def correct_means(student: nn.Module, images: Tensor) -> int:
    """Move the biases of a calibrated ``student``'s BatchNorms, in place; return how many.

    ``bias_c -= weight_c / sqrt(var_c + eps) * (E[x_c] - E[x_c without quantizers])`` for the inputs
    x of each, in the order of the forward, so that every layer is seen behind those before it.
    Whatever runs more than once, or has no bias, stays as it is. Weights that lie on their grids
    already, as ``balance_rounding`` leaves them, are what they are: then inputs alone count.

    Args:
        student: from ``prepare``, with its scales set.
        images: [N, C, H, W], the first of which are shown.
    """
    shown = images[:SHOWN].to(next(student.parameters()))
    wanted: dict[nn.Module, list[Tensor]] = {}

    def note(norm: nn.Module, args: tuple[Tensor]) -> None:
        wanted.setdefault(norm, []).append(_means(args[0]))

    def correct(norm: Any, args: tuple[Tensor]) -> None:
        if len(wanted[norm]) == 1:
            gain = norm.weight / (norm.running_var + norm.eps).sqrt()
            norm.bias -= gain * (_means(args[0]) - wanted[norm][0])

    norms = [m for m in student.modules() if isinstance(m, Frozen) and _has_bias(m)]
    with evaluating(student):
        with quantizing_only(student, None), _before(norms, note):
            student(shown)
        with _before(norms, correct):
            student(shown)
    return sum(len(means) == 1 for means in wanted.values())


def _has_bias(norm: nn.Module) -> bool:
    return all(getattr(norm, name, None) is not None for name in ("running_mean", "bias"))


def _means(x: Tensor) -> Tensor:
    """[B, C, ...] -> [C]."""
    return x.float().transpose(0, 1).flatten(1).mean(1)


@contextmanager
def _before(norms: Sequence[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Within, ``hook`` is called with each of ``norms`` and what reaches it."""
    handles = [norm.register_forward_pre_hook(hook) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

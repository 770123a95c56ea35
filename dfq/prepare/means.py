"""What quantizers did to the means of channels, taken back: bias correction.

Rounding errors do not average out: each channel's mean moves, and everything behind is off. The
BatchNorm that follows can take it back, exactly so for the images at hand (Nagel et al., DFQ,
arXiv:1906.04721, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dfq.hooks import removing
from dfq.prepare.frozen import Frozen, evaluating
from dfq.prepare.pairs import some
from dfq.prepare.sensitivity import quantizing_only
from dfq_kernels import batch_norm_statistics


@torch.no_grad()
def channel_means(student: nn.Module, images: Tensor) -> dict[nn.Module, Tensor]:
    """What reaches each BatchNorm of a prepared ``student`` without quantizers, on average; [C].

    Of those that run once and have a bias.

    Args:
        student: from ``prepare``, its weights not yet rounded.
        images: [N, C, H, W], of which some are shown, spread over all of them.
    """
    found: dict[nn.Module, list[Tensor]] = {}

    def note(norm: nn.Module, args: tuple[Tensor]) -> None:
        found.setdefault(norm, []).append(_means(norm, args[0]))

    norms = [m for m in student.modules() if isinstance(m, Frozen) and _has_bias(m)]
    with quantizing_only(student, None):
        _show(student, images, norms, note)
    return {norm: means[0] for norm, means in found.items() if len(means) == 1}


@torch.no_grad()
def correct_means(student: nn.Module, images: Tensor, wanted: Mapping[nn.Module, Tensor]) -> None:
    """Move the biases of BatchNorms of a calibrated ``student``, in place, to get means back.

    ``bias_c -= weight_c / sqrt(var_c + eps) * (E[x_c] - wanted_c)`` for the inputs x of each, in
    the order of the forward, so that every layer is seen behind those before it.

    Args:
        student: from ``prepare``, with its scales set and its weights rounded.
        images: as for ``channel_means``.
        wanted: from there; the means of these BatchNorms' inputs, each [C].
    """

    def correct(norm: Any, args: tuple[Tensor]) -> None:
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias -= gain * (_means(norm, args[0]) - wanted[norm])

    _show(student, images, wanted, correct)


def _has_bias(norm: nn.Module) -> bool:
    return all(getattr(norm, name, None) is not None for name in ("running_mean", "bias"))


def _means(norm: Any, x: Tensor) -> Tensor:
    """[B, C, ...] -> [C]."""
    return batch_norm_statistics(x, norm.running_mean.float())[0]


def _show(
    student: nn.Module, images: Tensor, norms: Iterable[nn.Module], hook: Callable[..., None]
) -> None:
    """Run ``student`` on some of ``images``; ``hook`` gets each of ``norms`` and its inputs."""
    with removing(norm.register_forward_pre_hook(hook) for norm in norms), evaluating(student):
        student(some(images).to(next(student.parameters())))

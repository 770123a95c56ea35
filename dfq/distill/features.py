"""What layers of two models put out, and how far they are apart."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfq.hooks import removing


@contextmanager
def capture_features(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of the named modules in the latest forward of ``model``, of the last call each.

    No hook is left when the context closes.
    """
    features: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        features[name] = output

    clear = model.register_forward_pre_hook(lambda *_: features.clear())
    hooks = removing(model.get_submodule(n).register_forward_hook(partial(keep, n)) for n in names)
    with clear, hooks:
        yield features


def feature_distance(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], names: Iterable[str]
) -> Tensor:
    """``mean |student_l - teacher_l| / mean |teacher_l|`` of each named layer l; [layers].

    Relative, so that no layer counts for its scale; the divisor is a constant.
    """
    return torch.stack([relative_distance(student[name], teacher[name]) for name in names])


def relative_distance(mine: Tensor, theirs: Tensor) -> Tensor:
    """``mean |mine - theirs| / mean |theirs|``; any shape -> []."""
    return (mine - theirs).abs().mean() / theirs.detach().abs().mean().clamp(min=1e-6)

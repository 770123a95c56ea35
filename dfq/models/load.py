"""MODEL string and weight file -> the teacher: frozen, eval, float32, checked."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from dfq.models import weights as weight_files
from dfq.models.build import build
from dfq.models.check import check
from dfq.types import DataSpec


def load(name: str, data: DataSpec, weights: str | Path | None = None) -> nn.Module:
    """Build ``name``, load ``weights`` and return it frozen, checked and in eval mode.

    Without ``weights`` a torchvision or timm model gets its library's own.

    Raises:
        InputError: what :func:`dfq.models.build`, the weight file or the checks refuse.
    """
    model = build(name, data.classes, pretrained=weights is None)
    if weights is not None:
        weight_files.load_into(model, weights, name)
    return freeze(model, data)


def freeze(model: nn.Module, data: DataSpec) -> nn.Module:
    """Copy ``model`` as a teacher: float32 on the CPU, eval mode, no gradients, checked.

    Convolution weights become channels_last, and with them the activations, also those of students
    made of it: on a CPU the convolutions of a training step then take 40 % less time. A model that
    looks at strides (``x.view`` of a map) keeps its layout.
    """
    teacher = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    check(teacher, data)
    teacher = teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        with torch.no_grad():
            teacher(torch.zeros(2, *data.shape))
    except RuntimeError:
        teacher = teacher.to(memory_format=torch.contiguous_format)
    return teacher

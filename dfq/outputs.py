"""What a model gives, logits of classes or maps, and how far the outputs of two models are apart.

Logits are one tensor [B, classes]. Maps are one tensor [B, C, ...] or any nest of tuples, lists and
dicts of such: what a detector or a segmenter gives before it is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def tensors(output: Any) -> list[Tensor]:
    """The tensors of an output, in the order of its containers.

    Raises:
        TypeError: it holds something else.
    """
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if not isinstance(output, tuple | list):
        raise TypeError(type(output).__name__)
    return [tensor for part in output for tensor in tensors(part)]


def are_logits(output: Any) -> bool:
    """Whether it is one tensor [B, classes]."""
    return isinstance(output, Tensor) and output.dim() == 2


def labels(output: Any) -> Tensor:
    """The class of each image, [B]: of the largest logit, and 0 where an output is maps."""
    if are_logits(output):
        return output.detach().argmax(1)
    first = tensors(output)[0]
    return torch.zeros(len(first), dtype=torch.int64, device=first.device)


def cast(output: Any, dtype: torch.dtype) -> Any:
    """The output in another dtype: a tensor as one, several as a list."""
    if isinstance(output, Tensor):
        return output.to(dtype)
    return [part.to(dtype) for part in tensors(output)]


def map_distance(output: Any, wanted: Any, power: int = 1) -> Tensor:
    """Mean of ``(|output - wanted| / unit) ** power``, averaged over maps; [B].

    The channels of a map may mean different things (a box, a class), so each is measured in a unit
    of its own: the mean distance of ``wanted`` from the channel's mean, but at least that of the
    average channel of the map, so that one that says nothing does not count for its noise.
    """
    pairs = zip(tensors(output), tensors(wanted), strict=True)
    return torch.stack([_distance(a, b, power) for a, b in pairs]).mean(0)


def map_errors(output: Any, wanted: Any) -> list[float]:
    """``mean |output - wanted| / mean |wanted|`` of each map."""
    pairs = zip(tensors(output), tensors(wanted), strict=True)
    return [float((a - b).abs().mean() / b.abs().mean().clamp(min=1e-12)) for a, b in pairs]


def _distance(output: Tensor, wanted: Tensor, power: int) -> Tensor:
    dims = [dim for dim in range(wanted.dim()) if dim != 1]
    spread = (wanted - wanted.mean(dims, keepdim=True)).abs().mean(dims, keepdim=True).detach()
    unit = torch.maximum(spread, spread.mean()).clamp(min=1e-6)
    return ((output - wanted).abs() / unit).pow(power).flatten(1).mean(1)

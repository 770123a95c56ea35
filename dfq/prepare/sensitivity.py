"""How much each layer matters: what a model suffers when that layer alone is quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfq.hooks import removing
from dfq.outputs import are_logits, cast, map_distance
from dfq.prepare.layers import quantized_layers
from dfq.prepare.quantizer import Quantizer

Importance = Literal["sensitivity", "hessian", "static", "uniform"]
PROBES = 4  # random vectors of the trace estimate


def layer_importance(
    teacher: nn.Module,
    student: nn.Module,
    images: Tensor,
    kind: Importance = "sensitivity",
    *,
    rng: torch.Generator,
) -> dict[str, float]:
    """How much each quantized layer of ``student`` matters; the mean over layers is 1.

    - ``sensitivity``: KL divergence of the outputs from the teacher's with that layer alone
      quantized (ZeroQ, arXiv:2001.00281); of maps their squared distance.
    - ``hessian``: the trace of the divergence's Hessian with respect to the layer's weight, by
      Hutchinson's estimate, per element (HAWQ-V2, arXiv:1911.03852).
    - ``static``: the layer's share of the weights.
    - ``uniform``: 1.

    Args:
        teacher: [B, C, H, W] -> logits [B, classes], or maps.
        student: calibrated, made of ``teacher`` by ``prepare``.
        images: [N, C, H, W], generated.
        kind: one of the above.
        rng: on the CPU, for the probes of ``hessian``.
    """
    layers = quantized_layers(student)
    if kind == "sensitivity":
        values = _sensitivities(teacher, student, images, layers)
    elif kind == "hessian":
        values = _traces(teacher, student, images, layers, rng)
    else:
        sizes = [float(layer.weight.numel()) for layer in layers.values()]
        values = torch.tensor(sizes if kind == "static" else [1.0] * len(sizes))
    values = values.clamp(min=0)
    mean = values.mean().clamp(min=torch.finfo(values.dtype).tiny)
    return dict(zip(layers, (values / mean).tolist(), strict=True))


@contextmanager
def quantizing_only(student: nn.Module, layer: nn.Module | None) -> Iterator[None]:
    """Within, ``student`` is float but for the quantizers of ``layer``."""
    kept = set(layer.modules()) if layer else set()
    others = [m for m in student.modules() if isinstance(m, Quantizer) and m not in kept]
    before = [quantizer.bypass for quantizer in others]
    for quantizer in others:
        quantizer.bypass = True
    try:
        yield
    finally:
        for quantizer, bypass in zip(others, before, strict=True):
            quantizer.bypass = bypass


@torch.no_grad()
def _sensitivities(
    teacher: nn.Module, student: nn.Module, images: Tensor, layers: Mapping[str, nn.Module]
) -> Tensor:
    wanted = teacher(images)
    found = []
    for layer in layers.values():
        with quantizing_only(student, layer):
            found.append(_divergence(student(images), wanted))
    return torch.stack(found)


def _traces(
    teacher: nn.Module,
    student: nn.Module,
    images: Tensor,
    layers: Mapping[str, nn.Module],
    rng: torch.Generator,
) -> Tensor:
    """Of the float student: the quantized one is flat almost everywhere.

    At the teacher's own weights the Hessian of the divergence is ``E[J' F J]`` with the Jacobian J
    of the logits and the Fisher matrix F of the softmax, so ``v' H v`` takes a forward derivative
    of the logits alone; here it is the divergence after a small step along v, times 2 / step^2.
    """
    step = 1e-3
    with torch.no_grad(), quantizing_only(student, None):
        wanted = cast(student(images), torch.float64)
        found = []
        for layer in layers.values():
            weight = layer.get_parameter("weight")
            saved, total = weight.clone(), torch.zeros((), device=weight.device)
            size = step * saved.square().mean().sqrt().clamp(min=1e-12)
            for _ in range(PROBES):
                sign = torch.randint(2, weight.shape, generator=rng).to(weight) * 2 - 1
                weight.copy_(saved + size * sign)
                total += _divergence(cast(student(images), torch.float64), wanted)
                weight.copy_(saved)
            found.append(2 * total / PROBES / size.square() / weight.numel())
    return torch.stack(found)


def _divergence(output: Any, wanted: Any) -> Tensor:
    """Of maps their squared distance, which like the other is quadratic in small differences."""
    if not are_logits(output):
        return map_distance(output, wanted, power=2).mean()
    log_p, log_q = F.log_softmax(output, 1), F.log_softmax(wanted, 1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


@torch.no_grad()
def norm_importance(teacher: nn.Module, importance: dict[str, float], image: Tensor) -> Tensor:
    """The importance of the layer before each call of a BatchNorm of ``teacher``, [calls].

    Args:
        teacher: the float model.
        importance: by layer, from ``layer_importance``.
        image: [1, C, H, W]; running it tells the order of calls.
    """
    latest, found = 1.0, []

    def hear(name: str) -> None:
        nonlocal latest
        if name in importance:
            latest = importance[name]
        else:
            found.append(latest)

    heard = {
        n: m for n, m in teacher.named_modules() if n in importance or isinstance(m, _BatchNorm)
    }
    hooks = removing(
        module.register_forward_hook(lambda m, x, y, name=name: hear(name))
        for name, module in heard.items()
    )
    with hooks:
        teacher(image)
    return torch.tensor(found, device=image.device)

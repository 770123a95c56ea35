"""What methods with block reconstruction share: from a prepared student and images to its end.

Here the quantizers of ``prepare`` meet the learner of ``distill``, which is described there.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfq.distill.blocks import find_units
from dfq.distill.reconstruct import (
    Knobs,
    ReconstructionConfig,
    Unit,
    reconstruct,
    reconstruction_units,
)
from dfq.prepare import QReLU, Quantizer, calibrate
from dfq.prepare.dropping import activation_quantizers, dropping
from dfq.prepare.layers import quantized_layers
from dfq.prepare.rounding import SoftRounding, soft_rounding
from dfq.prepare.trace import trace
from dfq.types import InputError, Report


def check_learned(student: nn.Module) -> None:
    """Refuse a student whose scales cannot be learned.

    Raises:
        InputError: it was prepared with ``scales="minmax"``.
    """
    modes = {layer.weight_quantizer.mode for layer in quantized_layers(student).values()}
    if modes - {"learned"}:
        raise InputError(
            "block reconstruction learns the scales of weights; use scales learned, not minmax."
        )


def reconstruct_blocks(
    student: nn.Module,
    images: Tensor,
    config: ReconstructionConfig,
    *,
    rng: torch.Generator,
    report: Report,
) -> None:
    """Calibrate ``student`` on ``images`` [N, C, H, W] and let it learn in place, unit by unit."""
    calibrate(student, images)
    student.requires_grad_(False)
    names = list(quantized_layers(student))
    graph = trace(student)
    plan = find_units(graph, student, names, (QReLU,)) if graph else None
    units = reconstruction_units(float_twin(student), student, plan, names, images)
    total = config.steps * (plan.units if plan else len(names))
    for index, unit in enumerate(units):
        tell = partial(_tell, report, index * config.steps, total)
        _reconstruct(student, unit, config, rng, tell)
    student.requires_grad_(True)


def float_twin(student: nn.Module) -> nn.Module:
    """A copy of a prepared ``student`` that computes in float: same graph, same names."""
    twin = copy.deepcopy(student)
    for module in twin.modules():
        if isinstance(module, Quantizer):
            module.bypass = True
    return twin


def _reconstruct(
    student: nn.Module,
    unit: Unit,
    config: ReconstructionConfig,
    rng: torch.Generator,
    tell: Callable[..., None],
) -> None:
    layers: list[Any] = [student.get_submodule(name) for name in unit.layers]
    rounded, dropped = soft_rounding(layers), dropping(unit.student, config.drop, rng)
    with rounded as roundings, dropped as redraw:
        knobs = _knobs(unit.student, roundings, redraw)
        reconstruct(unit, knobs, config, rng=rng, report=tell)
    unit.student.requires_grad_(False)


def _tell(report: Report, before: int, total: int, step: int, **values: Tensor) -> None:
    report("reconstruct", before + step, total, **values)


def _knobs(unit: nn.Module, roundings: list[SoftRounding], redraw: Callable[[], None]) -> Knobs:
    inputs = [q.log_scale for q in activation_quantizers(unit) if q.mode == "learned"]
    weights = [rounding.log_scale for rounding in roundings]
    for scale in (*weights, *inputs):
        scale.requires_grad_(True)
    return Knobs(
        rounding=[rounding.logits for rounding in roundings],
        weight_scales=weights,
        input_scales=inputs,
        penalty=lambda beta: torch.stack([r.penalty(beta) for r in roundings]).sum(),
        redraw=redraw,
    )

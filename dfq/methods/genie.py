"""GENIE: Show Me the Data for Quantization (Jeon et al., CVPR 2023).

arXiv:2212.04780. GENIE-D distills images from the teacher's BatchNorm statistics through the prior
of a generator whose latents are learned too; GENIE-M reconstructs the student block by block on
them, learning scales and rounding together.

The paper's, from the description of the released code: generator, learned latents, swing
convolution, losses, frozen integer base, soft rounding, QDrop, the loss of a block and its
schedule; ``GENIE_EFFORTS["paper"]`` holds the authors' numbers. Ours: the other efforts' numbers,
among them a generator that goes on from batch to batch (far nearer to the statistics for the same
steps), cached block inputs, units found in the traced graph, the pull towards hard rounding in
units of the block's error, scales learned by their logarithm, and grids as ``prepare`` makes them:
weights symmetric, activations asymmetric, residual sums on grids of their own.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dfq.distill.blocks import find_units
from dfq.distill.reconstruct import (
    GENIE_RECONSTRUCTION,
    Knobs,
    ReconstructionConfig,
    Unit,
    reconstruct,
    reconstruction_units,
)
from dfq.prepare import QConv2d, QLinear, QReLU, Quantizer, calibrate
from dfq.prepare.dropping import activation_quantizers, dropping
from dfq.prepare.rounding import SoftRounding, soft_rounding
from dfq.prepare.trace import trace
from dfq.synthesize.latents import GENIE_LATENTS, LatentConfig, distilled_batches
from dfq.types import DataSpec, Images, InputError, Report, silent


@dataclass(frozen=True)
class GENIEConfig:
    """Hyper-parameters; the defaults are ours, ``GENIE_EFFORTS["paper"]`` holds the authors'.

    Attributes:
        latents: GENIE-D, how images are distilled.
        reconstruction: GENIE-M, how each unit of the student learns.
    """

    latents: LatentConfig = field(default_factory=LatentConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)


_QUICK = GENIEConfig(LatentConfig(batches=4), ReconstructionConfig(steps=800))
_FULL = GENIEConfig(LatentConfig(batches=16, steps=200), ReconstructionConfig(steps=8000))
_PAPER = GENIEConfig(GENIE_LATENTS, GENIE_RECONSTRUCTION)
GENIE_EFFORTS = {"quick": _QUICK, "default": GENIEConfig(), "full": _FULL, "paper": _PAPER}


def genie(
    teacher: nn.Module,
    student: nn.Module,
    data: DataSpec,
    config: GENIEConfig,
    *,
    rng: torch.Generator,
    report: Report = silent,
) -> tuple[nn.Module, Images]:
    """Train ``student``, prepared from ``teacher``, in place; return it and its images."""
    _check_learned(student)
    batches = list(distilled_batches(teacher, data, config.latents, rng=rng, report=report))
    images = Images(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    calibrate(student, images.images)
    student.requires_grad_(False)
    names = [n for n, m in student.named_modules() if isinstance(m, QConv2d | QLinear)]
    graph = trace(student)
    plan = find_units(graph, student, names, (QReLU,)) if graph else None
    units = reconstruction_units(float_twin(student), student, plan, names, images.images)
    steps = config.reconstruction.steps
    total = steps * (plan.units if plan else len(names))
    for index, unit in enumerate(units):
        tell = partial(_tell, report, index * steps, total)
        _reconstruct(student, unit, config.reconstruction, rng, tell)
    return student.requires_grad_(True), images


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


def _check_learned(student: nn.Module) -> None:
    modes = {m.weight_quantizer.mode for m in student.modules() if isinstance(m, QConv2d | QLinear)}
    if modes - {"learned"}:
        raise InputError("GENIE learns the scales of weights; use scales learned, not minmax.")

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

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from dfq.distill.reconstruct import GENIE_RECONSTRUCTION, ReconstructionConfig
from dfq.methods.blockwise import check_learned, reconstruct_blocks
from dfq.synthesize.latents import GENIE_LATENTS, MAPS_LATENTS, LatentConfig, distilled_batches
from dfq.synthesize.pool import gather
from dfq.types import DataSpec, Images, Report, silent


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


def _for_maps(batches: int, steps: int) -> GENIEConfig:
    latents = replace(MAPS_LATENTS, batches=batches)
    return GENIEConfig(latents, ReconstructionConfig(steps=steps, batch_size=8))


GENIE_MAPS = {
    "quick": _for_maps(2, 200),
    "default": _for_maps(4, 500),
    "full": _for_maps(8, 2000),
}


def genie(
    teacher: nn.Module,
    student: nn.Module,
    data: DataSpec,
    config: GENIEConfig,
    *,
    given: Images | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> tuple[nn.Module, Images]:
    """Train ``student``, prepared from ``teacher``, in place; return it and its images."""
    check_learned(student)
    images = given or genie_images(teacher, data, config, rng=rng, report=report)
    reconstruct_blocks(student, images.images, config.reconstruction, rng=rng, report=report)
    return student, images


def genie_images(
    teacher: nn.Module,
    data: DataSpec,
    config: GENIEConfig,
    *,
    count: int | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> Images:
    """Distill ``count`` images from ``teacher``, or as many as ``config`` says."""
    latents = config.latents
    if count:
        latents = replace(latents, batches=-(-count // latents.batch_size))
    return gather(distilled_batches(teacher, data, latents, rng=rng, report=report), count)

"""What dfq does when no method is named: the parts that earned their place, in one line-up.

Ours, out of published parts. Images as GENIE-D distills them (arXiv:2212.04780), with a generator
that is kept. With many bits the weights are only rounded so that their errors cancel (SQuant,
arXiv:2202.07471), which takes a second; with fewer each block learns its rounding and its scales
(GENIE-M); with very few the whole student then goes on from there, distilling the teacher's outputs
end to end (PTQ as a warm start for QAT, as in GenQ, arXiv:2312.05272).

Tried on ResNet-20 at W3A3 and W2A2 and left out, since the student came no nearer to its teacher on
images of another network: a low-pass filter on the images (SynQ, ICLR 2025), and statistics that
are matched over all images instead of each batch (DGH, arXiv:2410.22110).
"""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from dfq.descent import anneal, descend
from dfq.distill.losses import output_divergence
from dfq.distill.reconstruct import ReconstructionConfig
from dfq.distill.student import StudentConfig, student_optimizer
from dfq.methods.blockwise import check_learned, reconstruct_blocks
from dfq.prepare import Quantizer, calibrate, split_parameters
from dfq.prepare.squant import balance_rounding
from dfq.synthesize.latents import MAPS_LATENTS, LatentConfig, distilled_batches
from dfq.synthesize.pool import Schedule, gather, lessons
from dfq.types import DataSpec, Images, Report, silent


@dataclass(frozen=True)
class RecipeConfig:
    """Hyper-parameters; all are ours.

    Which parts run is decided by the fewest bits that the student has anywhere, weights or
    activations.

    Attributes:
        latents: how images are distilled.
        reconstruction: how each block learns.
        student: how the whole student learns in the end.
        distill_steps: for how many steps; 0 leaves it out.
        distill_batch: images of such a step.
        mirror: blocks learn from the mirror image of each image too. On ResNet-20 this takes the
            divergence from the teacher, on images that were distilled from another network, from
            0.65 to 0.54 at W3A3 and from 1.46 to 1.39 at W2A2 (512 images, 300 steps).
        reconstruct_below: bits below which blocks are reconstructed.
        distill_below: bits below which the student is then distilled end to end.
    """

    latents: LatentConfig = field(default_factory=LatentConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    student: StudentConfig = field(default_factory=lambda: StudentConfig(lr=3e-4, scale_lr=1e-3))
    distill_steps: int = 2000
    distill_batch: int = 64
    mirror: bool = True
    reconstruct_below: int = 7
    distill_below: int = 4


_QUICK = RecipeConfig(LatentConfig(batches=4), ReconstructionConfig(steps=500), distill_steps=0)
_FULL = RecipeConfig(
    LatentConfig(batches=16, steps=200), ReconstructionConfig(steps=8000), distill_steps=10_000
)
# there is no paper of it
RECIPE_EFFORTS = {"quick": _QUICK, "default": RecipeConfig(), "full": _FULL}


def _for_maps(batches: int, steps: int, distill_steps: int) -> RecipeConfig:
    latents = replace(MAPS_LATENTS, batches=batches)
    reconstruction = ReconstructionConfig(steps=steps, batch_size=8)
    return RecipeConfig(latents, reconstruction, distill_steps=distill_steps, distill_batch=8)


RECIPE_MAPS = {
    "quick": _for_maps(2, 200, 50),
    "default": _for_maps(4, 500, 200),
    "full": _for_maps(8, 2000, 1000),
}


def recipe(
    teacher: nn.Module,
    student: nn.Module,
    data: DataSpec,
    config: RecipeConfig,
    *,
    given: Images | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> tuple[nn.Module, Images]:
    """Train ``student``, prepared from ``teacher``, in place; return it and its images."""
    check_learned(student)
    images = given or gather(
        distilled_batches(teacher, data, config.latents, rng=rng, report=report)
    )
    bits = fewest_bits(student)
    if bits < config.reconstruct_below:
        shown = images.images
        if config.mirror:
            shown = torch.cat((shown, shown.flip(-1)))
        reconstruct_blocks(student, shown, config.reconstruction, rng=rng, report=report)
    else:
        calibrate(student, images.images)
        balance_rounding(student)
    if bits < config.distill_below and config.distill_steps:
        _distill(teacher, student, images, config, rng, report)
    return student, images


def fewest_bits(student: nn.Module) -> int:
    """The least bits of a weight or an activation of a prepared ``student``."""
    return min(m.spec.bits for m in student.modules() if isinstance(m, Quantizer))


def _distill(
    teacher: nn.Module,
    student: nn.Module,
    images: Images,
    config: RecipeConfig,
    rng: torch.Generator,
    report: Report,
) -> None:
    optimizer = student_optimizer(*split_parameters(student), config.student)
    schedule = Schedule(1, 1, 1, config.distill_steps, config.distill_batch)
    for lesson in lessons([images], schedule, rng=rng):
        anneal(optimizer, lesson.step / lesson.steps, config.student.milestones)
        with torch.no_grad():
            wanted = teacher(lesson.images)
        output = student(lesson.images)
        loss = output_divergence(output, wanted, config.student.temperature).mean()
        descend(loss, optimizer)
        report("distill", lesson.step + 1, lesson.steps, kd=loss.detach())

"""LIS / MixMix: data-free compression by feature and data mixing (Li et al., ICCV 2021).

arXiv:2011.09899, first called Learning in School. Images are inverted from several trained models
at once, so that one set serves them all and any other; the student then learns from them.

The papers are known by their abstracts alone. The papers': several teachers drawn from
hierarchical courses (LIS), their features mixed, images mixed together with their labels (MixMix),
images made once for post-training quantization and for training. Our reconstruction: all losses,
how courses are drawn, how images are mixed, the resolutions that an image is a sum of, and every
number. The student learns as in GENIE-M, block by block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from dfq.bounds import COUNT
from dfq.distill.reconstruct import GENIE_RECONSTRUCTION, ReconstructionConfig
from dfq.methods.blockwise import check_learned, reconstruct_blocks
from dfq.synthesize.inversion import MIXMIX_INVERSION, InversionConfig, inverted_batches
from dfq.synthesize.pool import gather
from dfq.synthesize.teachers import Mode, TeacherSampler, in_courses
from dfq.types import DataSpec, Images, Report, silent


@dataclass(frozen=True)
class LISConfig:
    """Hyper-parameters; all are ours, since the paper's are not public.

    Attributes:
        inversion: how images are made.
        reconstruction: how each unit of the student learns.
        courses: how many teachers each course has, the model itself being the first of them; ()
            makes each teacher a course of its own.
        per_batch: courses that a batch of images attends, one teacher from each.
        mode: teachers are drawn for a "batch" of images, or anew for each "step".
    """

    inversion: InversionConfig = field(default_factory=InversionConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    courses: tuple[int, ...] = ()
    per_batch: int = 2
    mode: Mode = "batch"

    def __post_init__(self) -> None:
        COUNT.check(courses=self.courses, per_batch=self.per_batch)


_QUICK = LISConfig(InversionConfig(batches=4, steps=60), ReconstructionConfig(steps=800))
_FULL = LISConfig(InversionConfig(batches=16, steps=400), ReconstructionConfig(steps=8000))
_PAPER = LISConfig(MIXMIX_INVERSION, GENIE_RECONSTRUCTION)
LIS_EFFORTS = {"quick": _QUICK, "default": LISConfig(), "full": _FULL, "paper": _PAPER}


def lis(
    teacher: nn.Module,
    student: nn.Module,
    data: DataSpec,
    config: LISConfig,
    *,
    teachers: Sequence[nn.Module] = (),
    given: Images | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> tuple[nn.Module, Images]:
    """Train ``student``, prepared from ``teacher``, in place; return it and its images.

    ``teachers`` are further models whose images are those of ``data``; see ``Renormalized``.
    """
    check_learned(student)
    images = given or lis_images(teacher, data, config, teachers=teachers, rng=rng, report=report)
    reconstruct_blocks(student, images.images, config.reconstruction, rng=rng, report=report)
    return student, images


def lis_images(
    teacher: nn.Module,
    data: DataSpec,
    config: LISConfig,
    *,
    teachers: Sequence[nn.Module] = (),
    count: int | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> Images:
    """Invert ``count`` images from ``teacher`` and ``teachers``, or as many as ``config`` says."""
    inversion = config.inversion
    if count:
        inversion = replace(inversion, batches=-(-count // inversion.batch_size))
    courses = in_courses((teacher, *teachers), config.courses)
    sampler = TeacherSampler(courses, per_batch=config.per_batch, mode=config.mode)
    return gather(inverted_batches(sampler, data, inversion, rng=rng, report=report), count)

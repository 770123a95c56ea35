"""GDFQ: Generative Low-bitwidth Data Free Quantization (Xu et al., ECCV 2020).

arXiv:2003.03603. The teacher trains a class-conditional generator through its labels and its
BatchNorm statistics; the student learns from the teacher on what the generator makes.

The paper's: generator, its two losses, one network teaching one student. Ours, by default: latents
that stay for many steps and learn (``GeneratorConfig``), a pool of batches that many student steps
share, ranges taken from the pool after the warm-up instead of from the first fakes, divergence
from the teacher alone (AIT, arXiv:2203.17008: the cross entropy hurts), learned scales, Adam.
``GDFQ_EFFORTS["paper"]`` is the authors' cifar100_resnet20.hocon; use it with protocol gdfq and
min-max scales. It differs from their code in that ranges are taken from the last warm-up batch.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dfq.descent import anneal, descend
from dfq.distill.losses import kd_divergence
from dfq.distill.student import GDFQ_STUDENT, StudentConfig, student_optimizer
from dfq.prepare import calibrate, split_parameters
from dfq.synthesize.generate import (
    GDFQ_GENERATOR,
    GeneratorConfig,
    check_schedule,
    generated_batches,
)
from dfq.synthesize.pool import ImagePool, augment
from dfq.types import DataSpec, Images, Report, silent


@dataclass(frozen=True)
class GDFQConfig:
    """Hyper-parameters; the defaults are ours, ``GDFQ_EFFORTS["paper"]`` holds the authors'.

    Attributes:
        generator: how the generator learns.
        student: how the student learns.
        batches: generator batches in all.
        warmup_batches: batches made before the student begins; its ranges are taken then.
        pool_batches: the latest batches, from which the student draws.
        kd_weight: weight of the divergence from the teacher, summed over classes.
        class_weight: weight of the student's cross entropy against the generator's labels.
    """

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    batches: int = 8
    warmup_batches: int = 8
    pool_batches: int = 8
    kd_weight: float = 1.0
    class_weight: float = 0.0

    def __post_init__(self) -> None:
        check_schedule(self.batches, self.warmup_batches, self.pool_batches)


_QUICK = GDFQConfig(
    generator=GeneratorConfig(steps_per_batch=40),
    student=StudentConfig(steps_per_batch=400),
    batches=4,
    warmup_batches=4,
    pool_batches=4,
)
_FULL = GDFQConfig(
    student=StudentConfig(steps_per_batch=4000), batches=32, warmup_batches=32, pool_batches=32
)
_PAPER = GDFQConfig(
    generator=GDFQ_GENERATOR,
    student=GDFQ_STUDENT,
    batches=80_000,
    warmup_batches=800,
    pool_batches=1,
    kd_weight=0.01,  # the authors' KLDivLoss averages over the 100 classes too
    class_weight=1.0,
)
GDFQ_EFFORTS = {"quick": _QUICK, "default": GDFQConfig(), "full": _FULL, "paper": _PAPER}


def gdfq(
    teacher: nn.Module,
    student: nn.Module,
    data: DataSpec,
    config: GDFQConfig,
    *,
    rng: torch.Generator,
    report: Report = silent,
) -> tuple[nn.Module, Images]:
    """Train ``student``, prepared from ``teacher``, in place; return it and its images."""
    pool = ImagePool(config.pool_batches * config.generator.batch_size)
    optimizer = student_optimizer(*split_parameters(student), config.student)
    batches = generated_batches(
        teacher, data, config.generator, config.batches, rng=rng, report=report
    )
    steps = config.student.steps_per_batch
    total = steps * (config.batches - config.warmup_batches + 1)
    for batch, (images, labels) in enumerate(batches):
        pool.add(images, labels)
        if batch + 1 < config.warmup_batches:
            continue
        if batch + 1 == config.warmup_batches:
            calibrate(student, pool.all().images)
        first = steps * (batch + 1 - config.warmup_batches)
        for step in range(first, first + steps):
            anneal(optimizer, step / total, config.student.milestones)
            images, labels = pool.sample(config.student.batch_size, rng)
            images = augment(images, config.student.shift, rng)
            with torch.no_grad():
                teacher_logits = teacher(images)
            student_logits = student(images)
            kd = kd_divergence(student_logits, teacher_logits, config.student.temperature).mean()
            loss = config.kd_weight * kd
            if config.class_weight:
                loss = loss + config.class_weight * F.cross_entropy(student_logits, labels)
            descend(loss, optimizer)
            report("distill", step + 1, total, kd=kd.detach())
    return student, pool.all()

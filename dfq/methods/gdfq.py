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

from collections import deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dfq.bounds import NOT_NEGATIVE, POSITIVE
from dfq.descent import anneal, descend
from dfq.distill.losses import kd_divergence
from dfq.distill.student import GDFQ_STUDENT, StudentConfig, student_optimizer
from dfq.prepare import calibrate, split_parameters
from dfq.synthesize.generate import GDFQ_GENERATOR, GeneratorConfig, generated_batches
from dfq.synthesize.pool import GDFQ_SCHEDULE, Schedule, gather, given_batches, lessons
from dfq.types import DataSpec, Images, Report, silent


@dataclass(frozen=True)
class GDFQConfig:
    """Hyper-parameters; the defaults are ours, ``GDFQ_EFFORTS["paper"]`` holds the authors'.

    Attributes:
        generator: how the generator learns.
        student: how the student learns.
        schedule: when images are made and when the student learns; its ranges are taken when it
            begins.
        temperature: of the distillation.
        kd_weight: weight of the divergence from the teacher, summed over classes.
        class_weight: weight of the student's cross entropy against the generator's labels.
    """

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    schedule: Schedule = field(default_factory=Schedule)
    temperature: float = 4.0
    kd_weight: float = 1.0
    class_weight: float = 0.0

    def __post_init__(self) -> None:
        POSITIVE.check(temperature=self.temperature)
        NOT_NEGATIVE.check(kd_weight=self.kd_weight, class_weight=self.class_weight)


_QUICK = GDFQConfig(
    generator=GeneratorConfig(steps_per_batch=40),
    schedule=Schedule(batches=4, warmup_batches=4, pool_batches=4, steps_per_batch=400),
)
_FULL = GDFQConfig(
    schedule=Schedule(batches=32, warmup_batches=32, pool_batches=32, steps_per_batch=4000)
)
_PAPER = GDFQConfig(
    generator=GDFQ_GENERATOR,
    student=GDFQ_STUDENT,
    schedule=GDFQ_SCHEDULE,
    temperature=20.0,
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
    given: Images | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> tuple[nn.Module, Images]:
    """Train ``student``, prepared from ``teacher``, in place; return it and its images."""
    optimizer = student_optimizer(*split_parameters(student), config.student)
    batches = generated_batches(
        teacher, data, config.generator, config.schedule.batches, rng=rng, report=report
    )
    if given:
        batches = given_batches(given, config.schedule)
    for lesson in lessons(batches, config.schedule, rng=rng):
        if lesson.step == 0:
            calibrate(student, lesson.pool.images)
        anneal(optimizer, lesson.step / lesson.steps, config.student.milestones)
        with torch.no_grad():
            teacher_logits = teacher(lesson.images)
        student_logits = student(lesson.images)
        kd = kd_divergence(student_logits, teacher_logits, config.temperature).mean()
        loss = config.kd_weight * kd
        if config.class_weight:
            loss = loss + config.class_weight * F.cross_entropy(student_logits, lesson.labels)
        descend(loss, optimizer)
        report("distill", lesson.step + 1, lesson.steps, kd=kd.detach())
    return student, lesson.pool


def gdfq_images(
    teacher: nn.Module,
    data: DataSpec,
    config: GDFQConfig,
    *,
    count: int | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> Images:
    """Train the generator on ``teacher`` and keep its last ``count`` images, or a pool of them."""
    schedule, kept = config.schedule, config.schedule.pool_batches
    if count:
        kept = -(-count // config.generator.batch_size)
    total = max(schedule.batches, kept)
    made = generated_batches(teacher, data, config.generator, total, rng=rng, report=report)
    return gather(deque(made, maxlen=kept), count)

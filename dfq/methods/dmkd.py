"""DMKD: data-free low-bit quantization by dynamic multi-teacher knowledge distillation.

PRCV 2023, doi:10.1007/978-981-99-8543-2_3. A generator makes the images; the float
model and high-bit quantized copies of it teach one low-bit student; a tiny full-precision network,
trained along, says how much each teacher counts.

The paper is known by its abstract alone: those three sentences are its. Which teachers, what the
tiny network sees and what it minimizes, the losses and the schedule are our reconstruction, with
GDFQ's generator (arXiv:2003.03603) underneath; ``DMKD_EFFORTS["paper"]`` is GDFQ's schedule with
everything unknown at our reading R1 of it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dfq.descent import anneal, descend, seeded_layers
from dfq.distill.losses import multi_teacher_divergence
from dfq.distill.student import GDFQ_STUDENT, StudentConfig, student_optimizer
from dfq.distill.weighting import (
    Objective,
    TeacherWeightNet,
    WeightInput,
    weight_entropy,
    weighted_divergence,
)
from dfq.prepare import calibrate, prepare, split_parameters
from dfq.synthesize.generate import GDFQ_GENERATOR, GeneratorConfig, generated_batches
from dfq.synthesize.pool import GDFQ_SCHEDULE, Schedule, given_batches, lessons
from dfq.types import DataSpec, Images, Report, silent


@dataclass(frozen=True)
class DMKDConfig:
    """Hyper-parameters; all are ours, since the paper's are not public.

    Attributes:
        generator: how the generator learns.
        student: how the student learns.
        schedule: when images are made and when the student learns; all ranges are taken when it
            begins.
        teacher_bits: bits of the quantized teachers beside the float one, weights and activations.
        weight_input: what the weight net looks at.
        objective: what the weight net and the student minimize, R1 to R4 of ``weighting.py``.
        entropy_weight: of the objective "entropy".
        weight_lr: Adam's rate for the weight net.
    """

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    schedule: Schedule = field(default_factory=Schedule)
    teacher_bits: tuple[int, ...] = (8, 6)
    weight_input: WeightInput = "image"
    objective: Objective = "uncertainty"
    entropy_weight: float = 0.1
    weight_lr: float = 1e-3


_QUICK = DMKDConfig(
    generator=GeneratorConfig(steps_per_batch=40),
    schedule=Schedule(batches=4, warmup_batches=4, pool_batches=4, steps_per_batch=400),
)
_FULL = DMKDConfig(
    schedule=Schedule(batches=32, warmup_batches=32, pool_batches=32, steps_per_batch=4000)
)
_PAPER = DMKDConfig(
    generator=GDFQ_GENERATOR,
    student=GDFQ_STUDENT,
    schedule=GDFQ_SCHEDULE,
    objective="softmax",
)
DMKD_EFFORTS = {"quick": _QUICK, "default": DMKDConfig(), "full": _FULL, "paper": _PAPER}


def dmkd(
    teacher: nn.Module,
    student: nn.Module,
    data: DataSpec,
    config: DMKDConfig,
    *,
    given: Images | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> tuple[nn.Module, Images]:
    """Train ``student``, prepared from ``teacher``, in place; return it and its images."""
    teachers = [teacher, *(_quantized_teacher(teacher, bits, data) for bits in config.teacher_bits)]
    with seeded_layers(rng):
        weight_net = TeacherWeightNet(
            config.weight_input, len(teachers), data.shape[0], data.classes
        )
    weight_net.to(next(teacher.parameters()).device)
    optimizer = student_optimizer(*split_parameters(student), config.student)
    weight_optimizer = torch.optim.Adam(weight_net.parameters(), lr=config.weight_lr)
    batches = generated_batches(
        teacher, data, config.generator, config.schedule.batches, rng=rng, report=report
    )
    if given:
        batches = given_batches(given, config.schedule)
    for lesson in lessons(batches, config.schedule, rng=rng):
        if lesson.step == 0:
            for model in (*teachers[1:], student):
                calibrate(model, lesson.pool.images)
        anneal(optimizer, lesson.step / lesson.steps, config.student.milestones)
        with torch.no_grad():
            teacher_logits = [model(lesson.images) for model in teachers]
        student_logits = student(lesson.images)
        divergence = multi_teacher_divergence(
            student_logits, teacher_logits, config.student.temperature
        )
        scores = weight_net(
            lesson.images, torch.stack([*teacher_logits, student_logits.detach()], 1)
        )
        loss, weights = weighted_divergence(
            divergence, scores, config.objective, config.entropy_weight
        )
        descend(loss.mean(), optimizer, weight_optimizer)
        report("distill", lesson.step + 1, lesson.steps, **_measures(divergence, weights))
    return student, lesson.pool


def _quantized_teacher(teacher: nn.Module, bits: int, data: DataSpec) -> nn.Module:
    return prepare(teacher, f"w{bits}a{bits}", data=data).requires_grad_(False)


def _measures(divergence: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What the monitor shows: per-teacher divergence and weight, and the weights' entropy."""
    divergence, weights = divergence.detach().mean(0), weights.detach()
    measures = {"weight_entropy": weight_entropy(weights)}
    for index in range(len(divergence)):
        measures[f"kd_{index}"] = divergence[index]
        measures[f"weight_{index}"] = weights[:, index].mean()
    return measures

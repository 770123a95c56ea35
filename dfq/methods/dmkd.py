"""DMKD: data-free low-bit quantization by dynamic multi-teacher knowledge distillation.

PRCV 2023, doi:10.1007/978-981-99-8543-2_3. A generator makes the images; the float
model and high-bit quantized copies of it teach one low-bit student; a tiny full-precision network,
trained along, says how much each teacher counts.

The paper is known by its abstract alone: those three sentences are its. Which teachers, what the
tiny network sees and what it minimizes, the losses and the schedule are our reconstruction, with
GDFQ's generator (arXiv:2003.03603) underneath; ``DMKD_EFFORTS["paper"]`` is GDFQ's schedule with
everything unknown at our reading R1 of it. ``DMKD_BASELINES`` are what the learned weights have
to beat, ours too.

They do not, on ResNet-20 at W3A3 (quick, the same images for all, README.md): over three seeds the
drop is 2.0 with the float teacher alone, in two thirds of the time, 1.8 with equal weights and 2.0
with the learned ones, with a deviation of 0.1 to 0.3.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dfq.bounds import BITS, NOT_NEGATIVE, POSITIVE
from dfq.descent import anneal, descend, seeded_layers
from dfq.distill.losses import multi_teacher_divergence
from dfq.distill.meta import teacher_effects
from dfq.distill.student import GDFQ_STUDENT, StudentConfig, student_optimizer
from dfq.distill.weighting import (
    UNLEARNED,
    Objective,
    TeacherWeightNet,
    WeightInput,
    weight_entropy,
    weighted_divergence,
)
from dfq.prepare import calibrate, prepare, split_parameters
from dfq.synthesize.generate import GDFQ_GENERATOR, GeneratorConfig, generated_batches
from dfq.synthesize.pool import GDFQ_SCHEDULE, Lesson, Schedule, given_batches, lessons
from dfq.types import DataSpec, Images, InputError, Report, silent


@dataclass(frozen=True)
class DMKDConfig:
    """Hyper-parameters; all are ours, since the paper's are not public.

    Attributes:
        generator: how the generator learns.
        student: how the student learns.
        schedule: when images are made and when the student learns; all ranges are taken when it
            begins.
        temperature: of the distillation.
        float_teacher: whether the float model is the first of the teachers.
        teacher_bits: bits of the quantized teachers, weights and activations.
        weight_input: what the weight net looks at; "static" and "random" weights are not learned.
        static_weights: of "static", one a teacher, of any sum; empty: all equal.
        objective: what the weight net and the student minimize, R1 to R5 of ``weighting.py``.
        entropy_weight: of the objective "entropy".
        weight_lr: Adam's rate for the weight net.

    Raises:
        InputError: if nobody teaches, or the weights do not fit the teachers or the objective.
    """

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    schedule: Schedule = field(default_factory=Schedule)
    temperature: float = 4.0
    float_teacher: bool = True
    teacher_bits: tuple[int, ...] = (8, 6)
    weight_input: WeightInput = "image"
    static_weights: tuple[float, ...] = ()
    objective: Objective = "uncertainty"
    entropy_weight: float = 0.1
    weight_lr: float = 1e-3

    def __post_init__(self) -> None:
        POSITIVE.check(temperature=self.temperature, static_weights=self.static_weights)
        NOT_NEGATIVE.check(entropy_weight=self.entropy_weight, weight_lr=self.weight_lr)
        BITS.check(teacher_bits=self.teacher_bits)
        teachers = self.float_teacher + len(self.teacher_bits)
        if not teachers:
            raise InputError("nobody teaches: set float_teacher, or give teacher_bits.")
        weights = self.static_weights
        if weights and len(weights) != teachers:
            raise InputError(
                f"static_weights must be {teachers} numbers, one a teacher, got {weights}."
            )
        if self.weight_input in UNLEARNED and self.objective != "softmax":
            raise InputError(
                f"{self.weight_input} weights learn nothing, so that the objective must be "
                f"softmax, got {self.objective!r}."
            )


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
    temperature=20.0,
    objective="softmax",
)
DMKD_EFFORTS = {"quick": _QUICK, "default": DMKDConfig(), "full": _FULL, "paper": _PAPER}

# at the default effort; nothing of them is learned
_UNIFORM = DMKDConfig(weight_input="static", objective="softmax")
DMKD_BASELINES = {
    "float": replace(_UNIFORM, teacher_bits=()),  # the student's lesson in gdfq
    "uniform": _UNIFORM,
    "static": replace(_UNIFORM, static_weights=(3.0, 2.0, 1.0)),  # of float, 8 and 6 bits
    "high-bit": replace(_UNIFORM, float_teacher=False),
    "random": replace(_UNIFORM, weight_input="random"),
}


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
    quantized = [_quantized_teacher(teacher, bits, data) for bits in config.teacher_bits]
    teachers = [teacher, *quantized] if config.float_teacher else quantized
    # numbers of its own for the weighing: however that is done, the lessons are the same
    own_rng = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=rng)))
    weight_net = _weight_net(teacher, len(teachers), data, config, own_rng)
    optimizer = student_optimizer(*split_parameters(student), config.student)
    temperature = config.temperature
    weight_optimizer = torch.optim.Adam(  # a group may be empty, a list of parameters not
        [{"params": weight_net.parameters()}], lr=config.weight_lr
    )
    batches = generated_batches(
        teacher, data, config.generator, config.schedule.batches, rng=rng, report=report
    )
    if given:
        batches = given_batches(given, config.schedule)
    for lesson in lessons(batches, config.schedule, rng=rng):
        if lesson.step == 0:
            for model in (*quantized, student):
                calibrate(model, lesson.pool.images)
        anneal(optimizer, lesson.step / lesson.steps, config.student.milestones)
        with torch.no_grad():
            teacher_logits = [model(lesson.images) for model in teachers]
        student_logits = student(lesson.images)
        divergence = multi_teacher_divergence(student_logits, teacher_logits, temperature)
        scores = weight_net(
            lesson.images, torch.stack([*teacher_logits, student_logits.detach()], 1)
        )
        loss, weights = weighted_divergence(
            divergence, scores, config.objective, config.entropy_weight
        )
        if config.objective == "meta":  # held-out images ask for what the first teacher says
            images = _held_out(lesson, own_rng)
            effects = teacher_effects(
                student, optimizer, divergence, weights, images, teachers[0](images), temperature
            )
            loss = loss + weights @ effects
        descend(loss.mean(), optimizer, weight_optimizer)
        report("distill", lesson.step + 1, lesson.steps, **_measures(divergence, weights))
    return student, lesson.pool


def _quantized_teacher(teacher: nn.Module, bits: int, data: DataSpec) -> nn.Module:
    return prepare(teacher, f"w{bits}a{bits}", data=data).requires_grad_(False)


def _weight_net(
    teacher: nn.Module, teachers: int, data: DataSpec, config: DMKDConfig, rng: torch.Generator
) -> TeacherWeightNet:
    with seeded_layers(rng):
        net = TeacherWeightNet(
            config.weight_input,
            teachers,
            data.shape[0],
            data.classes,
            static_weights=config.static_weights,
            rng=rng,
        )
    return net.to(next(teacher.parameters()).device)


def _held_out(lesson: Lesson, rng: torch.Generator) -> Tensor:
    """As many images as the lesson has, drawn from the same pool, neither flipped nor moved.

    All images of the pool are learned from in time; held out are these from the student's step.
    """
    pool = lesson.pool.images
    index = torch.randint(len(pool), (len(lesson.images),), generator=rng)
    return pool[index.to(pool.device)]


def _measures(divergence: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """What the monitor shows: per-teacher divergence and weight, and the weights' entropy."""
    divergence, weights = divergence.detach().mean(0), weights.detach()
    measures = {"weight_entropy": weight_entropy(weights)}
    for index in range(len(divergence)):
        measures[f"kd_{index}"] = divergence[index]
        measures[f"weight_{index}"] = weights[:, index].mean()
    return measures

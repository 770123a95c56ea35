"""DDAQ: dual-discriminator adversarial framework for data-free quantization.

Neurocomputing 511, 2022, pages 67-77. One generator follows two discriminators: the first wants the
images to match the BatchNorm statistics of the float model, the second wants them to show where
float and quantized model differ; a prior of how much each layer matters is part of both. The
student then learns from the float model on these images.

The paper is known by its abstract alone: the above is its. What the discriminators compute (as in
DFAD and ZAQ they are criteria, not networks), the importance of a layer, the schedule and every
weight are our reconstruction.

A model of maps, such as a detector, learns without labels: the generator has none, matches the
statistics of all BatchNorm layers and follows the discrepancy of features and maps (the abstract
says only that the framework served object detection too).
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfq.bounds import COUNT, NOT_NEGATIVE, POSITIVE
from dfq.descent import anneal, descend, held_still
from dfq.distill.features import capture_features, feature_distance, relative_distance
from dfq.distill.losses import output_divergence
from dfq.distill.student import GDFQ_STUDENT, StudentConfig, student_optimizer
from dfq.outputs import are_logits, map_distance
from dfq.prepare import calibrate, split_parameters
from dfq.prepare.layers import QConv2d
from dfq.prepare.sensitivity import Importance, layer_importance, norm_importance
from dfq.synthesize.generate import (
    GDFQ_GENERATOR,
    GeneratorConfig,
    gdfq_criterion,
    generated_batches,
)
from dfq.synthesize.pool import GDFQ_SCHEDULE, Schedule, given_batches, lessons
from dfq.types import DataSpec, Images, Report, silent


@dataclass(frozen=True)
class DDAQConfig:
    """Hyper-parameters; all are ours, since the paper's are not public.

    Attributes:
        generator: how the generator learns; ``bn_weight`` is the first discriminator's.
        student: how the student learns.
        schedule: when images are made and when the student learns; its ranges are taken when it
            begins, and from then on the second discriminator has a say.
        temperature: of the distillation of logits.
        discrepancy_weight: of the second discriminator.
        feature_weight: of the distance of features in the student's loss.
        importance: how a layer's weight in both discriminators is found.
        importance_steps: student steps after which it is found anew.
    """

    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    schedule: Schedule = field(
        default_factory=lambda: Schedule(warmup_batches=4, steps_per_batch=300)
    )
    temperature: float = 4.0
    discrepancy_weight: float = 0.1
    feature_weight: float = 1.0
    importance: Importance = "sensitivity"
    importance_steps: int = 300

    def __post_init__(self) -> None:
        COUNT.check(importance_steps=self.importance_steps)
        POSITIVE.check(temperature=self.temperature)
        NOT_NEGATIVE.check(
            discrepancy_weight=self.discrepancy_weight, feature_weight=self.feature_weight
        )


_QUICK = DDAQConfig(
    generator=GeneratorConfig(steps_per_batch=40),
    schedule=Schedule(batches=4, warmup_batches=2, pool_batches=4, steps_per_batch=120),
)
_FULL = DDAQConfig(
    schedule=Schedule(batches=32, warmup_batches=8, pool_batches=32, steps_per_batch=200)
)
_PAPER = DDAQConfig(
    generator=GDFQ_GENERATOR, student=GDFQ_STUDENT, schedule=GDFQ_SCHEDULE, temperature=20.0
)
DDAQ_EFFORTS = {"quick": _QUICK, "default": DDAQConfig(), "full": _FULL, "paper": _PAPER}


def _for_maps(batches: int, steps_per_batch: int) -> DDAQConfig:
    """Large images are few in a batch; a detector's activations may be of any scale."""
    return DDAQConfig(
        generator=GeneratorConfig(batch_size=16, first_steps=40, bn_moment="relative"),
        schedule=Schedule(
            batches=batches,
            warmup_batches=batches // 2,
            pool_batches=batches,
            steps_per_batch=steps_per_batch,
            batch_size=8,
        ),
    )


DDAQ_MAPS = {"quick": _for_maps(2, 60), "default": _for_maps(4, 200), "full": _for_maps(16, 400)}


def ddaq(
    teacher: nn.Module,
    student: nn.Module,
    data: DataSpec,
    config: DDAQConfig,
    *,
    given: Images | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> tuple[nn.Module, Images]:
    """Train ``student``, prepared from ``teacher``, in place; return it and its images."""
    optimizer = student_optimizer(*split_parameters(student), config.student)
    layers = [name for name, module in student.named_modules() if isinstance(module, QConv2d)]
    prior: _Prior | None = None
    with capture_features(teacher, layers) as wanted, capture_features(student, layers) as shown:

        def discriminate(images: Images, output: Any, mismatch: Tensor) -> Tensor:
            if prior is None:  # the student knows nothing yet that could be held against it
                return gdfq_criterion(config.generator, images, output, mismatch)
            first = gdfq_criterion(config.generator, images, output, prior.of_norms * mismatch)
            with held_still(student):
                discrepancy = _discrepancy(student(images.images), output)
            features = (prior.of_layers * feature_distance(shown, wanted, layers)).mean()
            return first - config.discrepancy_weight * (discrepancy + features)

        batches = generated_batches(
            teacher,
            data,
            config.generator,
            config.schedule.batches,
            criterion=discriminate,
            rng=rng,
            report=report,
        )
        if given:
            batches = given_batches(given, config.schedule)
        for lesson in lessons(batches, config.schedule, rng=rng):
            if lesson.step == 0:
                calibrate(student, lesson.pool.images)
            if prior is None or lesson.step % config.importance_steps == 0:
                prior = _prior(teacher, student, lesson.images, config.importance, rng)
            anneal(optimizer, lesson.step / lesson.steps, config.student.milestones)
            with torch.no_grad():
                wanted_output = teacher(lesson.images)
            output = student(lesson.images)
            kd = output_divergence(output, wanted_output, config.temperature).mean()
            features = (prior.of_layers * feature_distance(shown, wanted, layers)).mean()
            descend(kd + config.feature_weight * features, optimizer)
            values = {"kd": kd.detach(), "features": features.detach()}
            report("distill", lesson.step + 1, lesson.steps, **values)
    return student, lesson.pool


def _discrepancy(output: Any, wanted: Any) -> Tensor:
    """L1, which neither saturates nor explodes when it is climbed (DFAD, ZAQ); []."""
    if are_logits(output):
        return relative_distance(output, wanted)
    return map_distance(output, wanted).mean()


class _Prior(NamedTuple):
    """How much each layer matters, for the two discriminators; the mean over layers is 1."""

    of_norms: Tensor  # [calls of a BatchNorm]
    of_layers: Tensor  # [convolutions]


def _prior(
    teacher: nn.Module, student: nn.Module, images: Tensor, kind: Importance, rng: torch.Generator
) -> _Prior:
    importance = layer_importance(teacher, student, images, kind, rng=rng)
    convolutions = [n for n, m in student.named_modules() if isinstance(m, QConv2d)]
    of_layers = torch.tensor([importance[name] for name in convolutions], device=images.device)
    return _Prior(norm_importance(teacher, importance, images[:1]), of_layers)

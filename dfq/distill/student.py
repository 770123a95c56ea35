"""How a student learns from images: the hyper-parameters every distilling method shares."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from dfq.bounds import NOT_NEGATIVE, SHARE


@dataclass(frozen=True)
class StudentConfig:
    """Hyper-parameters of the student; the defaults are ours, measured on ResNet-20 at W3A3.

    Attributes:
        lr: rate for weights, biases and BatchNorm's affine part, falling to 0.
        scale_lr: rate for the logarithms of the learned scales, falling to 0.
        optimizer: Adam, or SGD with Nesterov momentum 0.9 and weight decay 1e-4 (GDFQ's code).
        milestones: fractions of the way at which rates fall tenfold, instead of a cosine.
    """

    lr: float = 5e-4
    scale_lr: float = 5e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    milestones: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        NOT_NEGATIVE.check(lr=self.lr, scale_lr=self.scale_lr)
        SHARE.check(milestones=self.milestones)


GDFQ_STUDENT = StudentConfig(  # the authors' cifar100_resnet20.hocon: 400 epochs of 200 steps
    lr=1e-4,
    optimizer="sgd",
    milestones=(0.25, 0.5, 0.75),
)


def student_optimizer(
    weights: Iterable[nn.Parameter], scales: Iterable[nn.Parameter], config: StudentConfig
) -> torch.optim.Optimizer:
    """The optimizer that ``config`` asks for, with the scales in a group of their own."""
    groups: list[dict[str, object]] = [
        {"params": list(weights), "lr": config.lr},
        {"params": list(scales), "lr": config.scale_lr, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=1e-4)
    return torch.optim.Adam(groups)

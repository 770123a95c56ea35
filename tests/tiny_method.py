"""A method of a few steps, for the tests around the stages."""

from dataclasses import dataclass

import torch

from dfq.methods import Method
from dfq.prepare import calibrate
from dfq.types import Images, InputError


@dataclass(frozen=True)
class TinyConfig:
    """Fits the student's logits to the teacher's on noise.

    Attributes:
        steps: of gradient descent.
        lr: its rate.
        batch_size: images, drawn once.
        widths: no meaning; a tuple to write on the command line.
        explode: report NaN as the loss.
    """

    steps: int = 12
    lr: float = 0.01
    batch_size: int = 16
    widths: tuple[int, ...] = (8, 6)
    explode: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps must be positive, got {self.steps}.")


def learn(teacher, student, data, config, *, rng, report):
    """A method that is true to the contract of ``dfq.methods`` and has no other merit."""
    images = torch.randn(config.batch_size, *data.shape, generator=rng, device=rng.device)
    calibrate(student, images)
    target = teacher(images)
    optimizer = torch.optim.SGD(student.parameters(), lr=config.lr)
    for step in range(1, config.steps + 1):
        loss = (student(images) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told = loss.detach() * float("nan") if config.explode else loss.detach()
        report("fit", step, config.steps, loss=told, teacher_accuracy=0.5)
    return student, Images(images, target.argmax(1))


TINY = Method(learn, {"quick": TinyConfig(steps=3), "default": TinyConfig()})

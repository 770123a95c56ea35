"""Several models that images are inverted from: their normalizations, and which of them when."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from dfq.bounds import COUNT
from dfq.types import DataSpec, InputError

Mode = Literal["batch", "step"]


class Renormalized(nn.Module):
    """A model of images normalized as ``own`` says, for images normalized as ``data`` says.

    ``model(x * factor + offset)``: it sees the same pixels. See :func:`renormalization`.
    """

    factor: Tensor  # [C, 1, 1]
    offset: Tensor  # [C, 1, 1]

    def __init__(self, model: nn.Module, own: DataSpec, data: DataSpec):
        super().__init__()
        self.model = model
        factor, offset = renormalization(data, own)
        self.register_buffer("factor", factor)
        self.register_buffer("offset", offset)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images [B, C, H, W]."""
        return self.model(x * self.factor + self.offset)


def renormalized(model: nn.Module, own: DataSpec, data: DataSpec) -> nn.Module:
    """``model`` for images normalized as ``data`` says; itself if its own normalization is that."""
    return model if normalization(own) == normalization(data) else Renormalized(model, own, data)


def renormalization(source: DataSpec, target: DataSpec) -> tuple[Tensor, Tensor]:
    """``factor`` and ``offset``, [C, 1, 1] each, that take one normalization to another.

    With pixels ``p = x * std + mean`` of the source, ``x * factor + offset`` is
    ``(p - mean) / std`` of the target.
    """
    (mean, std), (new_mean, new_std) = (
        torch.tensor(normalization(data), dtype=torch.float64)[:, :, None, None]
        for data in (source, target)
    )
    return (std / new_std).float(), ((mean - new_mean) / new_std).float()


def normalization(data: DataSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of every channel, written out."""
    channels = data.shape[0]
    return tuple(data.mean) or (0.0,) * channels, tuple(data.std) or (1.0,) * channels


def in_courses(teachers: Sequence[nn.Module], sizes: Sequence[int]) -> list[list[nn.Module]]:
    """Cut ``teachers`` into courses of these sizes, in their order; () makes each its own course.

    Raises:
        InputError: the sizes do not add up to the number of teachers.
    """
    sizes = sizes or (1,) * len(teachers)
    if min(sizes) < 1 or sum(sizes) != len(teachers):
        raise InputError(
            f"courses of {', '.join(map(str, sizes))} teachers do not hold {len(teachers)} "
            "teachers; give sizes that add up to it (the model itself is the first)."
        )
    rest = iter(teachers)
    return [list(islice(rest, size)) for size in sizes]


class TeacherSampler:
    """Draws the teachers of a batch of images from hierarchical courses.

    A course is a group of teachers of one kind. Each draw takes ``per_batch`` courses without
    replacement, and from each one teacher; all courses, if there are no more. So batches differ in
    what they were made from, and no more than ``per_batch`` models run in a step. LIS
    (arXiv:2011.09899v1) samples teachers from courses; how is our reconstruction.

    Args:
        courses: groups of teachers.
        per_batch: teachers at a time.
        mode: "batch" draws once for a batch of images, "step" for each of its steps.

    Raises:
        InputError: there is no course, one of them is empty, or ``per_batch`` is below 1.
    """

    def __init__(
        self, courses: Sequence[Sequence[nn.Module]], *, per_batch: int = 2, mode: Mode = "batch"
    ):
        if not courses or not all(courses):
            raise InputError("every course needs a teacher, and there must be one course.")
        COUNT.check(per_batch=per_batch)
        self.courses, self.per_batch, self.mode = courses, per_batch, mode
        self._drawn: list[nn.Module] = []

    def draw(self, step: int, rng: torch.Generator) -> list[nn.Module]:
        """Teachers for this ``step`` of a batch, which begins at 0; ``rng`` is a CPU generator."""
        if step == 0 or self.mode == "step":
            order = torch.randperm(len(self.courses), generator=rng)[: self.per_batch]
            courses = [self.courses[index] for index in sorted(order.tolist())]
            self._drawn = [_one_of(course, rng) for course in courses]
        return self._drawn


def _one_of(course: Sequence[nn.Module], rng: torch.Generator) -> nn.Module:
    return course[int(torch.randint(len(course), (), generator=rng))]

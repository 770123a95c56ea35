"""A ring of generated images, so that many student steps share one costly generator batch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dfq.bounds import COUNT, NOT_NEGATIVE, SOME
from dfq.synthesize.crops import random_crops
from dfq.synthesize.swing import shifted
from dfq.types import Images, InputError


@dataclass(frozen=True)
class Schedule:
    """When images are made and when a student learns from them; the defaults are ours.

    Attributes:
        batches: generator batches in all.
        warmup_batches: batches made before the student begins.
        pool_batches: the latest batches, from which the student draws.
        steps_per_batch: student steps after each generator batch, once the student has begun.
        batch_size: images of a student step.
        shift: images are flipped at random and moved by up to so many pixels; None: left alone.
        least_area: then a part of each is shown, of at least so much of its area; 1: all of it.

    Raises:
        InputError: if the student would never begin, or find no images, or no part of one.
    """

    batches: int = 8
    warmup_batches: int = 8
    pool_batches: int = 8
    steps_per_batch: int = 1500
    batch_size: int = 64
    shift: int | None = 3
    least_area: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.warmup_batches <= self.batches:
            raise InputError(
                f"warmup_batches must be 1 to batches ({self.batches}), got "
                f"{self.warmup_batches}: the student begins when they are made."
            )
        COUNT.check(
            pool_batches=self.pool_batches,
            steps_per_batch=self.steps_per_batch,
            batch_size=self.batch_size,
        )
        NOT_NEGATIVE.check(shift=self.shift)
        SOME.check(least_area=self.least_area)


GDFQ_SCHEDULE = Schedule(  # the authors' cifar100_resnet20.hocon: 400 epochs of 200 steps
    batches=80_000,
    warmup_batches=800,
    pool_batches=1,
    steps_per_batch=1,
    batch_size=200,
    shift=None,
)


class Lesson(NamedTuple):
    """What a student learns from in one step."""

    images: Tensor  # [B, C, H, W], augmented
    labels: Tensor  # [B]
    step: int  # of ``steps``; 0 is the first
    steps: int
    pool: Images  # what they were drawn from, a view


def lessons(
    batches: Iterable[Images], schedule: Schedule, *, rng: torch.Generator
) -> Iterator[Lesson]:
    """The student's steps, between which the next of ``batches`` is made."""
    pool: ImagePool | None = None
    steps = schedule.steps_per_batch * (schedule.batches - schedule.warmup_batches + 1)
    for batch, (images, labels) in enumerate(batches, 1 - schedule.warmup_batches):
        pool = pool or ImagePool(schedule.pool_batches * len(images))
        pool.add(images, labels)
        first = batch * schedule.steps_per_batch
        for step in range(max(first, 0), first + schedule.steps_per_batch):
            images, labels = pool.sample(schedule.batch_size, rng)
            images = augment(images, schedule.shift, rng)
            images = random_crops(images, schedule.least_area, rng)
            yield Lesson(images, labels, step, steps, pool.all())


def gather(batches: Iterable[Images], count: int | None = None) -> Images:
    """All images of ``batches``, or the first ``count`` of them.

    Raises:
        InputError: there is no batch.
    """
    parts = list(batches)
    if not parts:
        raise InputError("no images are made; set batches to at least 1.")
    images, labels = (torch.cat(part)[:count] for part in zip(*parts, strict=True))
    return Images(images, labels)


def given_batches(images: Images, schedule: Schedule) -> Iterator[Images]:
    """``schedule.batches`` parts of ``images``, of which ``pool_batches`` hold all of them.

    Takes the place of a generator where the images are there already; after the last image the
    first one follows.
    """
    size = -(-len(images.images) // schedule.pool_batches)
    for batch in range(schedule.batches):
        index = torch.arange(batch * size, (batch + 1) * size) % len(images.images)
        index = index.to(images.images.device)
        yield Images(images.images[index], images.labels[index])


class ImagePool:
    """The latest ``capacity`` images [N, C, H, W] and their labels [N]; the oldest leave first."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._added = 0
        self._ring: Images | None = None  # allocated when the first batch tells the image's shape

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Keep a batch, [B, C, H, W] and [B], in the places of the oldest images."""
        images, labels = images[-self.capacity :].detach(), labels[-self.capacity :]
        if self._ring is None:
            self._ring = Images(
                images.new_empty(self.capacity, *images.shape[1:]), labels.new_empty(self.capacity)
            )
        places = torch.arange(self._added, self._added + len(labels), device=labels.device)
        places %= self.capacity
        self._ring.images[places], self._ring.labels[places] = images, labels
        self._added += len(labels)

    def all(self) -> Images:
        """Every image kept, a view."""
        if self._ring is None:
            raise ValueError("the pool is empty; add a batch first.")
        return Images(self._ring.images[: len(self)], self._ring.labels[: len(self)])

    def sample(self, batch_size: int, rng: torch.Generator) -> Images:
        """``batch_size`` images drawn with replacement by ``rng``, a CPU generator."""
        images, labels = self.all()
        index = torch.randint(len(self), (batch_size,), generator=rng).to(labels.device)
        return Images(images[index], labels[index])


def augment(images: Tensor, shift: int | None, rng: torch.Generator) -> Tensor:
    """Flip about half of the images and move all by up to ``shift`` pixels; [B, C, H, W].

    ``None`` leaves them as they are.
    Edges are mirrored, so that no border appears that the teacher never saw. ``rng`` is a CPU
    generator: the host must know how far.
    """
    if shift is None:
        return images
    flip = (torch.rand(len(images), generator=rng) < 0.5).to(images.device)
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    if shift == 0:
        return images
    for dim, offset in zip((2, 3), torch.randint(2 * shift + 1, (2,), generator=rng), strict=True):
        images = shifted(images, shift - int(offset), dim)
    return images

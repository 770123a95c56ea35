"""What a run starts from: the model, further teachers beside it, images that are there already."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from dfq.models import freeze, load
from dfq.pipeline.images import read_images
from dfq.synthesize.teachers import renormalized
from dfq.types import DataSpec, Images, InputError

if TYPE_CHECKING:
    from dfq.pipeline.request import Request

_NORMALIZATION = re.compile(r"(?P<rest>.*)@(?P<mean>[-+.\de,]*)/(?P<std>[-+.\de,]*)")


@dataclass(frozen=True)
class Teacher:
    """A trained model of the same classes and image shape as the one that is quantized.

    Attributes:
        model: a module, or a MODEL string.
        weights: its weight file; None takes those of the MODEL.
        mean: that its images were normalized with; None takes the quantized model's.
        std: likewise.
    """

    model: nn.Module | str
    weights: Path | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """What the user calls it."""
        return self.model if isinstance(self.model, str) else type(self.model).__name__

    def about(self) -> dict[str, Any]:
        """What result.json says of it."""
        weights = str(self.weights) if self.weights else None
        return {"model": self.name, "weights": weights, "mean": self.mean, "std": self.std}


class Inputs(NamedTuple):
    """What a run starts from.

    Attributes:
        model: the float model, frozen.
        teachers: further ones, that take the same images.
        images: to learn from, if they are there already.
    """

    model: nn.Module
    teachers: tuple[nn.Module, ...]
    images: Images | None

    def to(self, device: str) -> Inputs:
        """All of it on ``device``; modules move in place."""
        images = Images(*(t.to(device) for t in self.images)) if self.images else None
        return Inputs(self.model.to(device), tuple(t.to(device) for t in self.teachers), images)

    def options(self) -> dict[str, Any]:
        """What a method is told beyond the model, as keywords."""
        options = {"teachers": self.teachers, "given": self.images}
        return {name: value for name, value in options.items() if value}


def load_inputs(model: nn.Module, data: DataSpec, request: Request) -> Inputs:
    """Freeze ``model``, load the teachers and read the images that ``request`` names.

    Raises:
        InputError: one of them is wrong or cannot be read.
    """
    teachers = tuple(load_teacher(teacher, data) for teacher in request.teachers)
    images = read_images(request.images, data) if request.images else None
    return Inputs(freeze(model, data), teachers, images)


def parse_teacher(text: str) -> Teacher:
    """``MODEL``, ``MODEL=WEIGHTS`` or either with ``@MEAN/STD`` behind it.

    ``cifar:resnet32=r32.th@.5,.5,.5/.25,.25,.25`` was trained on images normalized that way.

    Raises:
        InputError: there is no MODEL in it, or no number where one should be.
    """
    mean = std = None
    if match := _NORMALIZATION.fullmatch(text):
        text = match["rest"]
        mean, std = (_numbers(match[name], text) for name in ("mean", "std"))
    model, _, weights = text.partition("=")
    if not model:
        raise InputError(f"a teacher is MODEL=WEIGHTS, got {text!r}; write a MODEL.")
    return Teacher(model, Path(weights) if weights else None, mean, std)


def load_teacher(teacher: Teacher, data: DataSpec) -> nn.Module:
    """The model, frozen, on the CPU, for images normalized as ``data`` says.

    Raises:
        InputError: its weights cannot be read, or it has other classes or another image shape.
    """
    mean = data.mean if teacher.mean is None else teacher.mean
    std = data.std if teacher.std is None else teacher.std
    try:
        own = dataclasses.replace(data, mean=mean, std=std)
        if isinstance(teacher.model, str):
            model = load(teacher.model, own, teacher.weights)
        else:
            model = freeze(teacher.model, own)
    except InputError as error:
        raise InputError(f"the teacher {teacher.name} cannot be used: {error}") from error
    return renormalized(model, own, data)


def _numbers(text: str, teacher: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",") if word)
    except ValueError:
        raise InputError(
            f"behind the @ of the teacher {teacher} stands MEAN/STD, numbers separated by commas; "
            f"got {text!r}."
        ) from None

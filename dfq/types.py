"""What every stage shares: the data's shape, the grid's shape, and how progress is told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class InputError(ValueError):
    """The caller's mistake: one sentence that says what, what was found and what to do."""


@dataclass(frozen=True)
class DataSpec:
    """All that a data-free method may know of the data: shape, classes and normalization.

    Attributes:
        shape: (channels, height, width) of one image.
        classes: number of classes; 0 of a model that gives maps, see :mod:`dfq.outputs`.
        mean: per-channel mean that was subtracted from images in 0..1; () means zeros.
        std: per-channel standard deviation that they were divided by; () means ones.
    """

    shape: tuple[int, int, int]
    classes: int = 0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise InputError(
                f"shape must be channels,height,width, got {self.shape}; write e.g. 3,32,32."
            )
        if self.classes < 2 and self.classes != 0:
            raise InputError(
                f"classes must be at least 2, or 0 if the model gives maps, got {self.classes}."
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != self.shape[0]:
                raise InputError(
                    f"{name} has {len(values)} values but shape has {self.shape[0]} channels; "
                    "give one value per channel."
                )
        if not all(0 < value < math.inf for value in self.std):
            raise InputError(f"std must be positive, got {self.std}.")
        if not all(map(math.isfinite, self.mean)):
            raise InputError(f"mean must be finite numbers, got {self.mean}.")

    @property
    def value_range(self) -> tuple[float, float]:
        """Smallest and largest value that a normalized image, 0..1 before, can hold."""
        channels = self.shape[0]
        pairs = list(
            zip(self.mean or (0.0,) * channels, self.std or (1.0,) * channels, strict=True)
        )
        return min((0 - mean) / std for mean, std in pairs), max(
            (1 - mean) / std for mean, std in pairs
        )


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid of one tensor: ``value = (code - zero_point) * scale``.

    Attributes:
        bits: 2 to 8.
        symmetric: zero_point is 0; otherwise it is chosen with the range.
        signed: codes are [-2**(bits-1), 2**(bits-1)-1]; otherwise [0, 2**bits-1].
        axis: channel axis with one scale a channel, or None for one scale a tensor.
        midrise: ``value = (code + 1/2) * scale``: levels lie evenly about zero and none is zero.
            With 2 bits that is {-1.5, -.5, .5, 1.5} * scale instead of {-2, -1, 0, 1} * scale.
    """

    bits: int
    symmetric: bool = True
    signed: bool = True
    axis: int | None = None
    midrise: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise InputError(f"bits must be 2 to 8, got {self.bits}.")
        if self.midrise and not (self.symmetric and self.signed):
            raise InputError("a midrise grid is symmetric and signed; set both or drop midrise.")

    @property
    def quant_min(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def quant_max(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1


class Images(NamedTuple):
    """A set of images and the classes they were made for.

    Attributes:
        images: [N, C, H, W], float32, normalized as the model expects.
        labels: [N], int64; zeros if the model knows no classes.
    """

    images: Tensor
    labels: Tensor


class Report(Protocol):
    """How a method tells what it does; called once a step, must not wait for the device."""

    def __call__(self, stage: str, step: int, steps: int, **values: Tensor | float) -> None:
        """``stage`` reached ``step`` of ``steps`` with these losses and measures."""


def silent(stage: str, step: int, steps: int, **values: Tensor | float) -> None:
    """Report nothing."""

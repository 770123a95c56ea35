"""Which numbers mean something; others are refused before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dfq.types import InputError


@dataclass(frozen=True)
class Bounds:
    """An interval of finite numbers, its ends None where it has none.

    Attributes:
        at_least: the least of them.
        above: the number that all of them are above.
        at_most: the largest of them.
        below: the number that all of them are below.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def check(self, **values: float | Sequence[float] | None) -> None:
        """Refuse a number out of bounds, or one of a sequence; None stands for no number.

        Raises:
            InputError: the value is called by its keyword.
        """
        for name, value in values.items():
            numbers = value if isinstance(value, Sequence) else (value,)
            if not all(number is None or self._holds(number) for number in numbers):
                raise InputError(f"{name} must be {self}, got {value}.")

    def _holds(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """For example "2 to 8" or "at least 0 and below 1"."""
        if self.at_least is not None and self.at_most is not None:
            return f"{self.at_least:g} to {self.at_most:g}"
        ends = {name: value for name, value in vars(self).items() if value is not None}
        return " and ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in ends.items())


COUNT = Bounds(at_least=1)  # of steps, batches or images that are to leave something to do
NOT_NEGATIVE = Bounds(at_least=0)
POSITIVE = Bounds(above=0)
SHARE = Bounds(at_least=0, at_most=1)
SOME = Bounds(above=0, at_most=1)  # a share that leaves something
NOT_ALL = Bounds(at_least=0, below=1)
BITS = Bounds(at_least=2, at_most=8)

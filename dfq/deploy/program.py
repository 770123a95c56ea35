"""A network as data: steps that read and write named values. No code is stored, none is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dfq.types import InputError

INPUT = "input"


@dataclass(frozen=True)
class Grid:
    """The integers of an activation: ``value = (code - zero_point) * scale``, per tensor.

    Stored is ``code - offset``, an int8: the zero_point is the offset where the codes then fit, so
    that real zero is 0 and padding costs nothing; otherwise it is 128. ``packed`` codes, two in a
    byte, are -8 to 7.
    """

    scale: float  # a float32
    zero_point: int
    quant_min: int
    quant_max: int
    packed: bool = False

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Grid:
        """Of ``as_dict``."""
        return cls(**stored)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Scale and zero_point, each [1], as the ops of dfq_kernels take them."""
        scale, zero_point = (
            torch.tensor([value], dtype=torch.float32, device=device)
            for value in (self.scale, self.zero_point)
        )
        return scale, zero_point

    @property
    def offset(self) -> int:
        """What is subtracted from a code before it is stored."""
        zero = self.zero_point
        if self.packed:
            return self.quant_min + 8
        fits = self.quant_min - zero >= -128 and self.quant_max - zero <= 127
        return zero if fits else 128 if self.quant_min >= 0 else 0

    @property
    def zero(self) -> int:
        """What is stored for real zero."""
        return self.zero_point - self.offset

    @property
    def low(self) -> int:
        """The smallest integer stored."""
        return self.quant_min - self.offset

    @property
    def high(self) -> int:
        """The largest integer stored."""
        return self.quant_max - self.offset


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        op: a key of ``operations.OPERATIONS``.
        inputs: names of the values that it reads.
        output: name of the value that it writes.
        numbers: what else it needs, of the types that JSON has.
        tensors: what it needs of the model's tensors: its name for each -> the model's name.
    """

    op: str
    inputs: tuple[str, ...]
    output: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "op": self.op,
            "inputs": list(self.inputs),
            "output": self.output,
            "numbers": dict(self.numbers),
            "tensors": dict(self.tensors),
        }


@dataclass(frozen=True)
class Program:
    """Steps in the order of their execution.

    Attributes:
        steps: what is done.
        output: name of the value that the network gives, or a list or dict of such.
        image: (channels, height, width) that it was made for; it may take others.
    """

    steps: tuple[Step, ...]
    output: Any
    image: tuple[int, int, int]

    def __post_init__(self) -> None:
        known = {INPUT}
        for step in self.steps:
            unknown = [name for name in step.inputs if name not in known]
            if unknown:
                raise InputError(f"step {step.output!r} reads {unknown[0]!r} before it is written.")
            known.add(step.output)
        for name in output_names(self.output):
            if name not in known:
                raise InputError(f"no step writes the output {name!r}.")

    def last_uses(self) -> dict[int, list[str]]:
        """After which step nobody reads a value any more."""
        last = {name: i for i, step in enumerate(self.steps) for name in step.inputs}
        uses: dict[int, list[str]] = {}
        kept = output_names(self.output)
        for name, index in last.items():
            if name not in kept:
                uses.setdefault(index, []).append(name)
        return uses

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "steps": [step.as_dict() for step in self.steps],
            "output": self.output,
            "image": list(self.image),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Program:
        """Of ``as_dict``.

        Raises:
            InputError: if it is none.
        """
        try:
            steps = tuple(
                Step(
                    str(step["op"]),
                    tuple(map(str, step["inputs"])),
                    str(step["output"]),
                    dict(step["numbers"]),
                    {str(role): str(name) for role, name in step["tensors"].items()},
                )
                for step in found["steps"]
            )
            channels, height, width = map(int, found["image"])
            return cls(steps, found["output"], (channels, height, width))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"the program of the model is damaged ({error!r}).") from error


def output_names(output: Any) -> list[str]:
    """The names in the output of a program, in its order.

    Raises:
        InputError: it is not made of names, lists and dicts.
    """
    if isinstance(output, str):
        return [output]
    if not isinstance(output, list | dict):
        raise InputError(f"the program of the model is damaged (its output is {output!r}).")
    parts = output.values() if isinstance(output, dict) else output
    return [name for part in parts for name in output_names(part)]

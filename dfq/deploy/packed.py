"""A network on integers: runs a program, and goes to a file and back as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfq.deploy import files
from dfq.deploy.operations import OPERATIONS, Place, check
from dfq.deploy.program import INPUT, Program
from dfq.types import InputError

Runs = Sequence[Callable[..., Any]]


class PackedModel(nn.Module):
    """Images [B, C, H, W] -> what the student gives; integers within, no float weights.

    On a GPU nothing waits for it, so that calls after the first can be captured in a CUDA graph.

    Args:
        program: what to do.
        tensors: weights and what belongs to them, by the names that the program has for them.

    Raises:
        InputError: if the program names an operation or a tensor that is not there.
    """

    def __init__(self, program: Program, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for step in program.steps:
            check(step)
            missing = [name for name in step.tensors.values() if name not in tensors]
            if missing:
                raise InputError(f"the model has no tensor {missing[0]!r}; its file is damaged.")
        self.program = program
        self._names = {name: f"tensor{index}" for index, name in enumerate(tensors)}
        for name, tensor in tensors.items():
            self.register_buffer(self._names[name], tensor)
        self._last_uses = program.last_uses()
        self._runs: Runs | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by the names that the program has for them."""
        return {name: self.get_buffer(buffer) for name, buffer in self._names.items()}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """Run the program; what a student gives in a list comes in a tuple."""
        if self._runs is None:  # weights are laid out for this device once
            self._runs = self.bind()
        return self.execute(images, self._runs)

    def bind(self, *, prepacked: bool = True) -> Runs:
        """The functions of all steps, on the device of the tensors.

        Args:
            prepacked: whether the CPU's kernels get a copy of the weights in their own order.
        """
        tensors = self.tensors()
        device = next((t.device for t in tensors.values()), torch.device("cpu"))
        place = Place(device, prepacked)
        return [
            OPERATIONS[step.op](
                step.numbers, {role: tensors[name] for role, name in step.tensors.items()}, place
            )
            for step in self.program.steps
        ]

    def execute(self, images: Tensor, runs: Runs) -> Any:
        """Run the program by the functions that ``bind`` gave."""
        values: dict[str, Any] = {INPUT: images}
        for index, (step, run) in enumerate(zip(self.program.steps, runs, strict=True)):
            values[step.output] = run(*[values[name] for name in step.inputs])
            for name in self._last_uses.get(index, ()):
                del values[name]
        return _gathered(self.program.output, values)

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file that ``dfq.load`` reads without the student's class."""
        files.write(path, self.program, self.tensors())

    def export(self, path: str | Path, *, int4: bool = False) -> None:
        """Write it for another runtime; see :func:`dfq.deploy.export`."""
        from dfq.deploy.export import export  # which knows this class

        export(self, path, int4=int4)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModel:
        self._runs = None  # the tensors go to another device
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_runs": None}  # a copy lays its weights out itself


def _gathered(output: Any, values: dict[str, Any]) -> Any:
    if isinstance(output, str):
        return values[output]
    if isinstance(output, dict):
        return {key: _gathered(part, values) for key, part in output.items()}
    return tuple(_gathered(part, values) for part in output)


def load(path: str | Path) -> PackedModel:
    """Read what ``PackedModel.save`` wrote; nothing in the file is executed.

    Raises:
        InputError: if it is no such file, is damaged, or was written by another version of dfq.
    """
    model = PackedModel(*files.read(path))
    try:
        model.bind(prepacked=False)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"a step of {path} is damaged ({error!r}); save it again.") from error
    return model

"""A network on integers: runs a program, and goes to a file and back as data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfq.deploy.operations import OPERATIONS, check
from dfq.deploy.program import INPUT, Program
from dfq.types import InputError

FORMAT = 1


class PackedModel(nn.Module):
    """Images [B, C, H, W] -> what the student gives; integers within, no float weights.

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
        self._runs: list[Callable[..., Any]] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by the names that the program has for them."""
        return {name: self.get_buffer(buffer) for name, buffer in self._names.items()}

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Run the program."""
        if self._runs is None:  # weights are laid out for this device once
            self._runs = self._bind()
        values: dict[str, Any] = {INPUT: images}
        last_uses = self._last_uses
        for index, (step, run) in enumerate(zip(self.program.steps, self._runs, strict=True)):
            values[step.output] = run(*(values[name] for name in step.inputs))
            for name in last_uses.get(index, ()):
                del values[name]
        return values[self.program.output]

    def save(self, path: str | Path) -> None:
        """Write a ``.safetensors`` file that ``dfq.load`` reads without the student's class."""
        from safetensors.torch import save

        header = {"format": FORMAT, "program": self.program.as_dict()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}
        partial = Path(f"{path}.part")
        partial.write_bytes(save(tensors, {"dfq_packed": json.dumps(header)}))
        partial.replace(path)

    def _bind(self) -> list[Callable[..., Any]]:
        tensors = self.tensors()
        self._last_uses = self.program.last_uses()
        return [
            OPERATIONS[step.op](
                step.numbers, {role: tensors[name] for role, name in step.tensors.items()}
            )
            for step in self.program.steps
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModel:
        self._runs = None  # the tensors go to another device
        return super()._apply(fn, recurse)


def load(path: str | Path) -> PackedModel:
    """Read what ``PackedModel.save`` wrote; nothing in the file is executed.

    Raises:
        InputError: if it is no such file, is damaged, or was written by a later dfq.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["dfq_packed"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged or no model ({error}); freeze and save again."
        ) from error
    except KeyError:
        raise InputError(
            f"{path} was not written by PackedModel.save; give another file."
        ) from None
    if header.get("format") != FORMAT:
        raise InputError(
            f"{path} has format {header.get('format')} and this dfq reads {FORMAT}; update dfq."
        )
    return PackedModel(Program.from_dict(header.get("program", {})), tensors)

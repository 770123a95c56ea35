"""Activations of 4 bits that lie two in a byte between layers: half the memory, for GPUs."""

from __future__ import annotations

import dataclasses
from typing import Any

from dfq.deploy.packed import PackedModel
from dfq.deploy.program import Grid, Program, Step, output_names
from dfq_kernels.packing import PACK_BK

LEVELS = 16
LAYERS = ("conv", "linear")


def pack_activations(model: PackedModel) -> PackedModel:
    """``model`` with every activation packed that layers alone write and read; the same values.

    That takes at most 4 bits, a multiple of 64 channels and no groups. On a CPU the layers unpack
    what they read, so it is slower there.
    """
    program = model.program
    grids = {s.output: Grid.of(s.numbers["grid"]) for s in program.steps if _can_write(s)}
    kept = output_names(program.output)
    for step in program.steps:
        for name in step.inputs:
            if not _can_read(step) or name in kept:
                grids.pop(name, None)
    packed = {name: dataclasses.replace(grid, packed=True) for name, grid in grids.items()}
    steps = tuple(_packed(step, packed) for step in program.steps)
    return PackedModel(Program(steps, program.output, program.image), model.tensors())


def _can_write(step: Step) -> bool:
    if not _can_read(step) or not step.numbers["grid"] or step.numbers["shape"][0] % PACK_BK:
        return False
    grid = Grid.of(step.numbers["grid"])
    few = grid.quant_max - grid.quant_min < LEVELS
    return few and grid.quant_min <= grid.zero_point <= grid.quant_max


def _can_read(step: Step) -> bool:
    return step.op in LAYERS and step.numbers.get("groups", 1) == 1


def _packed(step: Step, grids: dict[str, Grid]) -> Step:
    """The same step with the numbers that stand for zero in what it reads and writes now."""
    changed: dict[str, Any] = {}
    if step.output in grids:
        changed["grid"] = grids[step.output].as_dict()
    for name, number in zip(step.inputs, ("zero", "carried_zero"), strict=False):
        if name in grids:
            changed[number] = grids[name].zero
    return dataclasses.replace(step, numbers={**step.numbers, **changed})

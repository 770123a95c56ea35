"""fake_quantize_all in Triton: one launch for all tensors that are cut into the same tiles."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dfq_kernels._triton import fake_quantize_all_kernels as kernels
from dfq_kernels._triton.fake_quantize import (
    BACKWARD_LOADS,
    FORWARD_LOADS,
    MOST_TILES,
    Tiling,
    fake_quantize,
    fake_quantize_backward,
    finish_constants,
    tiling_of,
)
from dfq_kernels._triton.launch import launch
from dfq_kernels._triton.layout import Layout, layout_of_strides

MOST_TENSORS = 16  # of a launch: their pointers and sizes are its arguments


def fake_quantize_all(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    quant_mins: Sequence[int],
    quant_maxs: Sequence[int],
) -> list[Tensor]:
    """See dfq_kernels.fake_quantize_all."""
    grids = scales, zero_points, quant_mins, quant_maxs
    plan = _plan(_described((xs,), grids), FORWARD_LOADS, 1)
    ys: list[Any] = [torch.empty_like(x) for x in xs]
    for group in plan.groups:
        args = group.starts, group.of(xs), group.of(ys), group.grids(grids), group.walks
        launch(kernels.rows_forward_all, group.programs, xs[0], *args, **group.constants)
    for i in plan.alone:
        ys[i] = fake_quantize(xs[i], *_grid(grids, i))
    return ys


def fake_quantize_all_backward(
    grads: Sequence[Tensor],
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    quant_mins: Sequence[int],
    quant_maxs: Sequence[int],
    needs_x: bool,
    needs_scale: bool,
    needs_zero_point: bool,
) -> list[Tensor]:
    """See dfq_kernels.fake_quantize_all: all dx, all dscale, all dzero_point."""
    grids = scales, zero_points, quant_mins, quant_maxs
    needs = needs_x, needs_scale, needs_zero_point
    plan = _plan(_described((grads, xs), grids), BACKWARD_LOADS, MOST_TILES)
    dxs = [torch.empty_like(x) if needs_x else x.new_empty(0) for x in xs]
    dscales, dzero_points = (
        [scale.new_empty(scale.shape if needed else 0) for scale in scales] for needed in needs[1:]
    )
    sums = [scales[0].new_empty(plan.sums) if needed else None for needed in needs[1:]]
    for group in plan.groups:
        targets = group.of(dxs) if needs_x else None
        inputs = group.starts, group.of(grads), group.of(xs), targets, *sums
        args = *inputs, group.places, group.grids(grids), group.walks
        launch(kernels.rows_backward_all, group.programs, xs[0], *args, **group.constants)
    for group in plan.finish if needs_scale or needs_zero_point else ():
        gradients = [
            group.of(tensors) if needed else None
            for tensors, needed in zip((dscales, dzero_points), needs[1:], strict=True)
        ]
        args = group.starts, *sums, group.places, group.of(scales), *gradients, *group.walks
        launch(kernels.finish_backward_all, group.programs, xs[0], *args, **group.constants)
    for i in plan.alone:
        args = grads[i], xs[i], *_grid(grids, i)
        dxs[i], dscales[i], dzero_points[i] = fake_quantize_backward(*args, *needs)
    return [*dxs, *dscales, *dzero_points]


Grids = tuple[Sequence[Any], ...]  # scales, zero_points, quant_mins, quant_maxs


def _grid(grids: Grids, i: int) -> tuple[Any, ...]:
    """What fake_quantize takes behind the ``i``-th x."""
    axis = None if grids[0][i].numel() == 1 else 0
    return *(values[i] for values in grids), axis, 0.0, None


class _Description(NamedTuple):
    """All that a plan depends on, of one x."""

    shape: torch.Size
    strides: tuple[tuple[int, ...], ...]  # of its gradient (only backward) and its own
    dtype: torch.dtype
    aligned: tuple[bool, ...]
    grid: tuple[tuple[int, ...], ...]  # shape of the scale, and strides of it and the zero_point


def _described(inputs: Sequence[Sequence[Tensor]], grids: Grids) -> tuple[_Description, ...]:
    return tuple(
        _Description(
            tensors[-1].shape,
            tuple(tensor.stride() for tensor in tensors),
            tensors[-1].dtype,
            tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors),
            (scale.shape, scale.stride(), zero_point.stride()),
        )
        for *tensors, scale, zero_point in zip(*inputs, *grids[:2], strict=True)
    )


@dataclass(frozen=True)
class _Group:
    """Tensors of one launch: where each's programs begin, and what the kernels are told of it."""

    members: tuple[int, ...]
    starts: tuple[int, ...]
    programs: int
    places: tuple[int, ...]  # of its sums among all
    walks: tuple[tuple[int, ...], ...]  # in the second stage: parts and channels
    constants: dict[str, Any]

    def of(self, values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[i] for i in self.members)

    def grids(self, grids: Grids) -> tuple[tuple[Any, ...], ...]:
        scales = self.of(grids[0])
        return scales, *map(self.of, grids[1:]), tuple(scale.numel() for scale in scales)


@dataclass(frozen=True)
class _Plan:
    groups: tuple[_Group, ...]
    finish: tuple[_Group, ...]
    alone: tuple[int, ...]  # through fake_quantize
    sums: int  # for each of the two gradients


@functools.lru_cache(maxsize=64)
def _plan(descriptions: tuple[_Description, ...], loads: int, most_tiles: int) -> _Plan:
    tilings: dict[int, Tiling] = {}
    for i, description in enumerate(descriptions):
        layout = _dense_rows(description)
        if layout:
            tilings[i] = tiling_of(layout, description.dtype.itemsize, loads, most_tiles)
    channels = {i: descriptions[i].grid[0][0] for i in tilings}
    starts, sums = _starts(tilings[i].parts * channels[i] for i in tilings)
    tiles, finish = {}, {}
    for (i, tiling), place in zip(tilings.items(), starts, strict=True):
        kind = descriptions[i].dtype, descriptions[i].aligned, *tiling.constants.values()
        tiles[i] = _Member(kind, tiling.programs, place, _walk(tiling), tiling.constants)
        constants = finish_constants(channels[i])
        width = constants["CHANNELS"]
        programs, sizes = triton.cdiv(channels[i], width), (tiling.parts, channels[i])
        finish[i] = _Member((width,), programs, place, sizes, constants)
    alone = tuple(i for i in range(len(descriptions)) if i not in tilings)
    return _Plan(_grouped(tiles), _grouped(finish), alone, sums)


class _Member(NamedTuple):
    """One of the tensors in a group: those of one kind are launched together."""

    kind: tuple[Any, ...]
    programs: int
    place: int
    walk: tuple[int, ...]
    constants: dict[str, Any]


def _grouped(members: dict[int, _Member]) -> tuple[_Group, ...]:
    kinds: dict[Any, list[int]] = {}
    for i, member in members.items():
        kinds.setdefault(member.kind, []).append(i)
    groups = []
    for kind in kinds.values():
        for first in range(0, len(kind), MOST_TENSORS):
            some = tuple(kind[first : first + MOST_TENSORS])
            starts, programs = _starts(members[i].programs for i in some)
            places = tuple(members[i].place for i in some)
            walks = tuple(zip(*(members[i].walk for i in some), strict=True))
            constants = members[some[0]].constants
            groups.append(_Group(some, starts, programs, places, walks, constants))
    return tuple(groups)


def _dense_rows(description: _Description) -> Layout | None:
    """Rows of a channel each, or one row, right behind one another in every tensor; else None."""
    (channels,), *strides = description.grid
    if 0 in description.shape or any(channels > 1 and step != (1,) for step in strides):
        return None
    axis = None if channels == 1 else 0
    layout = layout_of_strides(
        description.shape, description.strides[-1], description.strides, axis
    )
    length = layout.columns.count
    dense = layout.rows.count == 1 or set(layout.rows.strides) == {(length,)}
    narrow = layout.columns.extent < 2**31 - 2**16
    return layout if dense and narrow and layout.contiguous and not layout.run else None


def _walk(tiling: Tiling) -> tuple[int, ...]:
    rows, _, _, units, (length,), _, tiles, splits = tiling.walk
    return rows, units, length, tiles, splits


def _starts(counts: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """Where each begins if they follow one another, and where the last ends."""
    *starts, total = itertools.accumulate(counts, initial=0)
    return tuple(starts), total

"""fake_quantize_all in Triton: one launch for all tensors that are cut into the same tiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

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
from dfq_kernels._triton.layout import Layout, layout_of

MOST_TENSORS = 16  # of a launch: their pointers and sizes are its arguments


@dataclass(frozen=True)
class _Job:
    """What fake_quantize, or its backward, is to do for one of the tensors."""

    inputs: tuple[Tensor, ...]  # x; backward its gradient first
    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    output: Tensor  # y or dx
    tiling: Tiling | None  # None: it goes alone, through fake_quantize

    def arguments(self) -> tuple[Any, ...]:
        """Those of fake_quantize, or of its backward without the last."""
        axis = None if self.scale.numel() == 1 else 0
        grid = self.scale, self.zero_point, self.quant_min, self.quant_max
        return *self.inputs, *grid, axis, 0.0, None


Lists = Sequence[Sequence[Any]]  # scales, zero_points, quant_mins, quant_maxs


def fake_quantize_all(
    xs: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    quant_mins: Sequence[int],
    quant_maxs: Sequence[int],
) -> list[Tensor]:
    """See dfq_kernels.fake_quantize_all."""
    inputs = [(x,) for x in xs]
    jobs = _jobs(inputs, (scales, zero_points, quant_mins, quant_maxs), FORWARD_LOADS, 1)
    for group in _groups(jobs):
        starts, programs = _starts(job.tiling.programs for job in group)
        xs, ys = zip(*((job.inputs[0], job.output) for job in group), strict=True)
        args = starts, xs, ys, _grids(group), _walks(group)
        launch(kernels.rows_forward_all, programs, xs[0], *args, **group[0].tiling.constants)
    return [job.output if job.tiling else fake_quantize(*job.arguments()) for job in jobs]


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
    inputs = list(zip(grads, xs, strict=True))
    lists = scales, zero_points, quant_mins, quant_maxs
    needs = needs_x, needs_scale, needs_zero_point
    jobs = _jobs(inputs, lists, BACKWARD_LOADS, MOST_TILES)
    together = [job for job in jobs if job.tiling]
    places = _places(together)
    sums = [_sums(together, needed) for needed in needs[1:]]
    for group in _groups(jobs):
        starts, programs = _starts(job.tiling.programs for job in group)
        grads, xs = zip(*(job.inputs for job in group), strict=True)
        dxs = tuple(job.output for job in group) if needs_x else None
        mine = tuple(places[id(job)] for job in group)
        args = starts, grads, xs, dxs, *sums, mine, _grids(group), _walks(group)
        launch(kernels.rows_backward_all, programs, xs[0], *args, **group[0].tiling.constants)
    finished = _finish(together, sums, places)
    results = [
        (job.output, *finished[id(job)])
        if job.tiling
        else fake_quantize_backward(*job.arguments(), *needs)
        for job in jobs
    ]
    return [
        gradient if needed else gradient.new_empty(0)
        for gradients, needed in zip(zip(*results, strict=True), needs, strict=True)
        for gradient in gradients
    ]


def _jobs(
    inputs: Sequence[tuple[Tensor, ...]], lists: Lists, loads: int, most_tiles: int
) -> list[_Job]:
    jobs = []
    for tensors, scale, zero_point, *bounds in zip(inputs, *lists, strict=True):
        output = torch.empty_like(tensors[-1])
        tiling = None
        if output.numel() and scale.stride() == zero_point.stride() == (1,):
            layout = layout_of(output, tensors, None if scale.numel() == 1 else 0)
            if _is_dense(layout):
                tiling = tiling_of(layout, output.element_size(), loads, most_tiles)
        jobs.append(_Job(tensors, scale, zero_point, *bounds, output, tiling))
    return jobs


def _is_dense(layout: Layout) -> bool:
    """Rows of channels, or one row, right behind one another in every tensor."""
    length = layout.columns.count
    dense = layout.rows.count == 1 or set(layout.rows.strides) == {(length,)}
    return dense and layout.contiguous and not layout.run and layout.columns.extent < 2**31 - 2**16


def _groups(jobs: Sequence[_Job]) -> list[list[_Job]]:
    """Those that one launch can do: of one dtype, alignment and kind of tile."""
    groups: dict[Any, list[_Job]] = {}
    for job in jobs:
        if job.tiling:
            tensors = *job.inputs, job.output
            aligned = tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)
            key = job.output.dtype, aligned, *job.tiling.constants.values()
            groups.setdefault(key, []).append(job)
    return [part for group in groups.values() for part in _parts(group)]


def _parts(group: list[Any]) -> list[list[Any]]:
    return [group[i : i + MOST_TENSORS] for i in range(0, len(group), MOST_TENSORS)]


def _starts(programs: Iterable[int]) -> tuple[tuple[int, ...], int]:
    """Where each tensor's programs begin, and how many there are."""
    *starts, total = itertools.accumulate(programs, initial=0)
    return tuple(starts), total


def _grids(group: Sequence[_Job]) -> tuple[tuple[Any, ...], ...]:
    grids = ((j.scale, j.zero_point, j.quant_min, j.quant_max, j.scale.numel()) for j in group)
    return tuple(zip(*grids, strict=True))


def _walks(group: Sequence[_Job]) -> tuple[tuple[int, ...], ...]:
    walks = (job.tiling.walk for job in group)
    return tuple(zip(*((w[0], w[3], w[4][0], w[6], w[7]) for w in walks), strict=True))


def _places(jobs: Sequence[_Job]) -> dict[int, int]:
    """Where in the buffer of all sums those of each job begin."""
    starts, _ = _starts(job.tiling.parts * job.scale.numel() for job in jobs)
    return {id(job): start for job, start in zip(jobs, starts, strict=True)}


def _sums(jobs: Sequence[_Job], needed: bool) -> Tensor | None:
    if not needed or not jobs:
        return None
    return jobs[0].scale.new_empty(sum(job.tiling.parts * job.scale.numel() for job in jobs))


def _finish(
    jobs: Sequence[_Job], sums: Sequence[Tensor | None], places: dict[int, int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """The second stage: dscale and dzero_point of each job, where there are sums of them."""
    results = {id(j): (torch.empty_like(j.scale), torch.empty_like(j.scale)) for j in jobs}
    if sums[0] is None and sums[1] is None:
        return results
    by_width: dict[int, list[_Job]] = {}
    for job in jobs:
        by_width.setdefault(finish_constants(job.scale.numel())["CHANNELS"], []).append(job)
    for width, group in ((w, part) for w, all_ in by_width.items() for part in _parts(all_)):
        starts, programs = _starts(triton.cdiv(job.scale.numel(), width) for job in group)
        targets = zip(*(results[id(job)] for job in group), strict=True)
        mine = [t if part is not None else None for t, part in zip(targets, sums, strict=True)]
        scales, where, parts, channels = zip(
            *((j.scale, places[id(j)], j.tiling.parts, j.scale.numel()) for j in group), strict=True
        )
        args = starts, *sums, where, scales, *mine, parts, channels
        constants = finish_constants(width)
        launch(kernels.finish_backward_all, programs, scales[0], *args, **constants)
    return results

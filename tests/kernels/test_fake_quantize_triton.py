"""How the Triton kernels of fake_quantize cut tensors into tiles; and every way of it is right."""

import dataclasses
import mmap

import pytest
import torch
from conftest import BACKENDS
from fake_quantize_cases import DTYPE_IDS, DTYPES, assert_parity

pytest.importorskip("triton")
from dfq_kernels._triton import fake_quantize as ops
from dfq_kernels._triton import fake_quantize_all as all_ops
from dfq_kernels._triton.layout import layout_of

LAST = torch.channels_last


def _grid(channels):
    return torch.rand(channels) + 0.1, torch.randint(-3, 4, (channels,)).float(), -8, 7


def _assert_parity(x, axis, drop=0.5):
    args = (x, *_grid(1 if axis is None else x.shape[axis]), axis, drop, torch.tensor([2**33]))
    grad = torch.empty_like(x).copy_(torch.randn(x.shape))
    with BACKENDS["triton"]():
        assert_parity(grad, args)


@pytest.fixture
def tiles_of_a_program(monkeypatch):
    """Small tensors give each program as many tiles as large ones."""
    monkeypatch.setattr(ops, "ENOUGH_PROGRAMS", 2)
    ops.tiling_of.cache_clear()

    def count(x, axis, loads):
        layout = layout_of(torch.empty_like(x), (x,), axis)
        return ops.tiling_of(layout, x.element_size(), loads, ops.MOST_TILES).walk[6]

    yield count
    ops.tiling_of.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize(
    ("shape", "axis", "layout", "tiles"),
    [
        ((20_003,), None, torch.contiguous_format, {4: 8, 2: 5}),
        ((3, 2, 60, 50), 1, torch.contiguous_format, {4: 3, 2: 2}),
        ((2, 64, 13, 17), 1, LAST, {4: 7, 2: 7}),
        ((150, 3, 5, 5), 1, torch.contiguous_format, {4: 5, 2: 3}),
    ],
    ids=["flat", "planes", "channels last", "small planes"],
)
def test_programs_of_many_tiles(tiles_of_a_program, shape, axis, layout, tiles, dtype):
    x = torch.randn(shape).to(dtype)
    x = x.contiguous(memory_format=layout) if x.ndim == 4 else x
    assert tiles_of_a_program(x, axis, ops.BACKWARD_LOADS) == tiles[x.element_size()]
    _assert_parity(x, axis)


def test_second_stage_sums_in_float64():
    """Programs leave 2**25, 1 and -2**25: in float32 nothing of the 1 would remain."""
    grad = torch.cat([torch.full((1024,), 2.0**15), torch.ones(1), torch.zeros(1023)])
    grad = torch.cat([grad, -grad[:1024]])
    args = (torch.full_like(grad, 100.0), torch.ones(1), torch.zeros(1), -8, 7, None, 0.0, None)
    _, dscale, dzero_point = ops.fake_quantize_backward(grad, *args, True, True, True)
    assert (dscale.item(), dzero_point.item()) == (7, -1)


@pytest.mark.parametrize("axis", [None, 0, 3])
@pytest.mark.parametrize("far", [0, 1, 2, 3])
def test_offsets_of_64_bits(far, axis):
    """One dimension strides over gigabytes of address space, of which little is ever touched."""
    shape = (3, 3, 3, 4)
    strides = [2**30 if d == far else 8**d for d in range(4)]  # 2**31 is an int64 by itself
    storage = mmap.mmap(-1, 2 * (2**30 * (shape[far] - 1) + 8**4))
    x = torch.frombuffer(storage, dtype=torch.bfloat16).as_strided(shape, strides)
    x.copy_(torch.randn(shape))
    _assert_parity(x, axis)


@pytest.mark.parametrize("shape", [(4099,), (30, 4, 5)], ids=["flat", "columns"])
def test_columns_of_64_bits(shape, monkeypatch):
    """As for more than 2**31 of them."""
    tiling_of = ops.tiling_of

    def wide(*args):
        tiling = tiling_of(*args)
        return dataclasses.replace(tiling, constants={**tiling.constants, "WIDE": True})

    monkeypatch.setattr(ops, "tiling_of", wide)
    _assert_parity(torch.randn(shape), None if len(shape) == 1 else 2)


@pytest.mark.parametrize(
    ("x", "axis", "expected"),
    [
        (torch.empty(5, 7, 11), None, ((1,), (385,), 0, 8)),
        (torch.empty(5, 7, 11).permute(2, 0, 1), None, ((1,), (385,), 0, 8)),
        (torch.empty(4, 6, 10, 12), 1, ((24,), (120,), 0, 8)),
        (torch.empty(4, 6, 7, 7), 1, ((24,), (49,), 0, 1)),
        (torch.empty(16, 6, 7, 7), 1, ((16,), (6 * 49,), 49, 2)),
        (torch.empty(64, 16, 3, 3), 0, ((64,), (144,), 0, 8)),
        (torch.empty(2, 72, 9, 9).to(memory_format=LAST), 1, ((162,), (72,), 1, 8)),
        (torch.empty(2, 3, 8, 8).to(memory_format=LAST), 1, ((4,), (96,), 1, 8)),
        (torch.empty(6, 8, 8, 8)[:, 2:6], None, ((6,), (256,), 0, 8)),
        (torch.empty(6, 8, 8, 9)[..., :8], 1, ((48,), (8, 8), 0, 1)),
    ],
    ids=["dense", "permuted", "planes", "few small planes", "small planes", "weights",
         "channels last", "3 channels last", "some channels", "cut planes"],
)  # fmt: skip
def test_layout(x, axis, expected):
    """Sizes of rows and columns, columns of a channel, and what is loaded at once."""
    layout = layout_of(torch.empty_like(x), (x,), axis)
    assert (layout.rows.sizes, layout.columns.sizes, layout.run, layout.vector) == expected


def test_one_launch_for_all_tensors_of_a_kind(monkeypatch):
    """The first by itself, as its rows are of another length; the last through fake_quantize."""
    shapes = [(8, 3, 7, 7), *[(32, 16, 3, 3), (64, 16, 3, 3), (40, 16, 3, 3)], (6,)]
    launched, launch = [], all_ops.launch

    def record(kernel, *args, **constants):
        launched.append(kernel.fn.__name__)
        launch(kernel, *args, **constants)

    monkeypatch.setattr(all_ops, "launch", record)
    xs = [torch.randn(shape) for shape in shapes]
    scales, zero_points = ([make(x.shape[0]) for x in xs] for make in (torch.ones, torch.zeros))
    lists = xs, scales, zero_points, [-8] * 5, [7] * 5
    with BACKENDS["triton"]():
        all_ops.fake_quantize_all(*lists)
        all_ops.fake_quantize_all_backward(xs, *lists, True, True, True)
    forward, backward = ["rows_forward_all"] * 2, ["rows_backward_all"] * 2
    finish = ["finish_backward_all"] * 2  # for 8 channels, and for 32 at a time
    assert launched == [*forward, *backward, *finish]

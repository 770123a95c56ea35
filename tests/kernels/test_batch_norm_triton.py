"""How the Triton kernels of batch_norm cut tensors into tiles; and every way of it is right."""

import mmap

import pytest
import torch
from batch_norm_cases import LAYOUTS, assert_backward, assert_forward, tensors

pytest.importorskip("triton")
from dfq_kernels._triton import batch_norm_tiles as tiles

on_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture
def few_programs(monkeypatch):
    """As many as asked for, so that small tensors give each of them many tiles."""

    def allow(programs):
        monkeypatch.setattr(tiles, "PROGRAMS", programs)
        tiles._tile.cache_clear()

    yield allow
    tiles._tile.cache_clear()


@on_triton
@pytest.mark.parametrize(
    ("layout", "shape", "programs", "iterations", "splits"),
    [
        ("contiguous", (3, 2, 40, 40), 2, 10, 1),  # one row is 4 elements of a plane, a tile 128
        ("contiguous", (290, 2, 3, 3), 4, 5, 4),  # ... a sample, a tile 16
        ("channels-last", (2, 7, 24, 25), 4, 5, 4),  # ... a position, a tile 64
        ("channels-last", (3, 70, 9, 5), 12, 3, 3),  # ... a third of a position, a tile 16
        ("every second", (2, 2, 30, 21), 2, 3, 1),  # ... an element, a tile 512
    ],
    ids=["planes", "joined planes", "channels", "many channels", "strided"],
)
def test_programs_of_many_tiles(backend, few_programs, layout, shape, programs, iterations, splits):
    few_programs(programs)
    x, parameters = tensors(shape, layout=layout)
    tiling = tiles.tile(x, torch.empty_like(x))
    assert (tiling.iterations, tiling.splits) == (iterations, splits)
    assert_forward(x, parameters)
    assert_backward(LAYOUTS[layout](torch.randn(shape)), x, parameters)


@on_triton
@pytest.mark.parametrize("far", [0, 1, 2, 3])
def test_offsets_of_64_bits(backend, far):
    """One dimension strides over 4 GB of address space, of which little is ever touched."""
    shape = (3, 2, 3, 2)
    strides = [2**31 if d == far else 8**d for d in range(4)]
    storage = mmap.mmap(-1, 2 * (2**31 * (shape[far] - 1) + 8**4))
    x = torch.frombuffer(storage, dtype=torch.bfloat16).as_strided(shape, strides)
    values, parameters = tensors(shape, torch.bfloat16)
    x.copy_(values)
    assert tiles.tile(x).wide
    assert_forward(x, parameters)
    assert_backward(x, values, parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        *[((32, c, 14, 14), "channels-last") for c in (16, 24, 48, 64, 96, 144, 320, 2048)],
        *[((64, 64, n, n), "contiguous") for n in (112, 56, 32, 28, 16, 14, 8, 7)],
        ((512, 1000), "contiguous"),
    ],
    ids=str,
)
def test_tiles_of_networks(shape, layout, dtype):
    """Loads of 16 bytes, at most a third of them idle, and neither few programs nor many."""
    x = LAYOUTS[layout](torch.empty(shape, dtype=dtype, device="meta"))
    tiling = tiles.tile(x, x)
    assert tiling.unit * dtype.itemsize == 16
    tile = tiling.height * tiling.width
    assert tile * dtype.itemsize == 16 * 32 * tiles.WARPS
    assert tiling.programs * tiling.iterations * tile < 1.5 * x.numel() + tiling.columns * tile
    assert min(264, x.numel() // tile) <= tiling.programs <= 4 * tiles.PROGRAMS


def test_tiles_hold_every_element_once():
    for shape in [(5, 3, 11, 7), (128, 64, 32, 32), (64, 2048, 7, 7), (100000, 70), (2, 1, 3)]:
        for layout in LAYOUTS:
            x = LAYOUTS[layout](torch.empty(shape, device="meta"))
            tiling = tiles.tile(x)
            assert tiling.count * tiling.channels == x.numel()
            of_split = tiling.iterations * tiling.height
            assert (tiling.splits - 1) * of_split < tiling.rows <= tiling.splits * of_split

"""Which tiles the Triton kernels of qconv2d and qlinear take, and how they count border pixels."""

import itertools
import json
import math

import pytest

pytest.importorskip("triton")
from dfq_kernels._triton import integer_plan, integer_tuned
from dfq_kernels._triton.integer_border import classes
from dfq_kernels._triton.integer_plan import Kind, Layer, Tile, plan
from dfq_kernels._triton.integer_pointers import reaches_far

SHARED = {80: 163, 86: 99, 89: 99, 90: 227}  # KB of a program


def _layers():
    for batch, channels, outputs, size in itertools.product(
        (1, 8, 256), (3, 16, 48, 64, 96, 256, 2048), (10, 64, 128, 512), (7, 14, 56)
    ):
        for kernel, stride in ((1, 1), (1, 2), (3, 1), (3, 2), (7, 2)):
            out = (size + 2 * (kernel // 2) - kernel) // stride + 1
            pairs = [(n, n) for n in (size, out, kernel, stride, kernel // 2)]
            yield Layer(batch, pairs[0], channels, pairs[1], outputs, *pairs[2:])


@pytest.mark.parametrize("sm", SHARED)
def test_tiles_fit_the_shared_memory(sm):
    for layer, w4 in itertools.product(_layers(), (False, True)):
        tile = plan(layer, Kind(w4), sm).tile
        weights = tile.outputs * tile.depth // (2 if w4 else 1)
        taken = tile.stages * (tile.pixels * tile.depth + weights)
        assert taken <= SHARED[sm] * 1024 - 2048, (layer, tile)
        assert 16 <= tile.outputs <= 128
        assert 16 <= tile.pixels <= 256
        assert 32 <= tile.depth <= 128


def test_boxes_waste_little():
    for layer in _layers():
        chosen = plan(layer, Kind(), 90)
        if chosen.kernel == "descriptors" and not layer.plain:
            box = chosen.tile.box
            assert math.prod(box) == chosen.tile.pixels
            sides = zip((layer.batch, *layer.out_size), box, strict=True)
            covered = math.prod(-(-n // part) * part for n, part in sides)
            assert covered <= 1.31 * layer.pixels or layer.pixels < 400, (layer, box)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_pixels_of_a_class_see_the_same_taps(stride, dilation):
    for size, kernel, padding in itertools.product(range(1, 9), range(1, 6), range(6)):
        out = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if out < 1:
            continue
        pairs = [(1, n) for n in (size, out, kernel, stride)]
        layer = Layer(1, pairs[0], 1, pairs[1], 1, *pairs[2:], (0, padding), (1, dilation))
        count, first, skip = classes(layer, 1).arguments
        seen = {}
        for index in range(out):
            kind = min(index, first) + max(index - first - skip, 0)
            assert 0 <= kind < count
            places = (index * stride - padding + tap * dilation for tap in range(kernel))
            taps = tuple(0 <= place < size for place in places)
            assert seen.setdefault(kind, taps) == taps
        assert len(seen) == count


def test_far_offsets_are_noticed():
    tile = Tile(128, 128, 128, 8, 3)
    near = Layer(256, (224, 224), 64, (224, 224), 64, (3, 3), padding=(1, 1))
    assert not reaches_far(near, tile)  # 822 million elements, but not from one image to the next
    assert reaches_far(Layer(1, (30000, 30000), 4, (30000, 30000), 4), tile)
    assert reaches_far(Layer(2**25, (8, 8), 1, (8, 8), 1), tile)  # pixels


def test_tuned_tiles_are_taken(tmp_path, monkeypatch):
    layer = Layer(8, (14, 14), 256, (14, 14), 256, (3, 3), padding=(1, 1))
    tile = {"pixels": 64, "outputs": 128, "depth": 64, "warps": 4, "stages": 3, "box": [1, 8, 8]}
    key = "w8a8 256 256 3x3 /1x1 2^11"
    (tmp_path / "sm90.json").write_text(json.dumps({key: tile}))
    monkeypatch.setattr(integer_tuned, "FOLDER", tmp_path)
    integer_plan.plan.cache_clear()
    assert plan(layer, Kind(), 90).tile == Tile(64, 128, 64, 4, 3, box=(1, 8, 8))
    integer_plan.plan.cache_clear()

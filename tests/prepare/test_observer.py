import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dfq.prepare import observer
from dfq.prepare.grid import range_to_scale, to_grid
from dfq.prepare.observer import EmaMinMax, Sample, minmax, search_scale
from dfq.types import QuantSpec

SIZES = st.floats(-(2.0**100), 2.0**100, width=32)
SPECS = [
    pytest.param(QuantSpec(4), id="symmetric"),
    pytest.param(QuantSpec(3, signed=False), id="unsigned"),
    pytest.param(QuantSpec(4, symmetric=False), id="asymmetric"),
    pytest.param(QuantSpec(2, midrise=True), id="midrise"),
]


def test_minmax_per_tensor_and_per_channel():
    x = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[5.0, 4.0], [-6.0, 7.0]]])
    assert [v.tolist() for v in minmax(x, None)] == [[-6.0], [7.0]]
    assert [v.tolist() for v in minmax(x, 0)] == [[-2.0, -6.0], [3.0, 7.0]]
    assert [v.tolist() for v in minmax(x, 1)] == [[-2.0, -6.0], [5.0, 7.0]]


@given(SIZES, SIZES)
def test_ema_of_a_constant_is_that_constant_at_every_step(low, high):
    average = EmaMinMax()
    for _ in range(30):
        average.update(torch.tensor([low]), torch.tensor([high]))
        assert average.low.item() == low
        assert average.high.item() == high


@given(hnp.arrays("float32", (25, 2), elements=st.floats(-100, 100, width=32)))
def test_ema_is_the_accumulator_over_its_weight(ranges):
    average, decay, accumulated = EmaMinMax(decay=0.8), 0.8, torch.zeros(2, dtype=torch.float64)
    for step, (low, high) in enumerate(torch.from_numpy(ranges), start=1):
        average.update(low.reshape(1), high.reshape(1))
        accumulated = decay * accumulated + (1 - decay) * torch.stack([low, high]).double()
        found = torch.cat([average.low, average.high]).double()
        torch.testing.assert_close(found, accumulated / (1 - decay**step), rtol=0, atol=2e-4)


def test_ema_reset_forgets():
    average = EmaMinMax(2)
    average.update(torch.tensor([-9.0, -8.0]), torch.tensor([9.0, 8.0]))
    average.reset()
    average.update(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0]))
    assert average.low.tolist() == [-1.0, -2.0]
    assert average.high.tolist() == [1.0, 2.0]


def _errors(x, spec):
    """{ratio: error} by the definition, in float64."""
    errors = {}
    for percent in range(1, 101):
        ratio = percent / 100
        scale, zero_point = range_to_scale(x.min()[None] * ratio, x.max()[None] * ratio, spec)
        half = 0.5 if spec.midrise else 0.0
        codes = torch.round(x.double() / scale.double() - half) + zero_point
        codes = codes.clamp(spec.quant_min, spec.quant_max)
        values = (codes - zero_point + half) * scale.double()
        errors[ratio] = ((x.double() - values).abs() ** 2.4).sum().item(), scale.item()
    return errors


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shift", [0.0, 2.0], ids=["centered", "shifted"])
def test_search_finds_the_brute_force_optimum(spec, shift):
    x = torch.randn(4000) ** 3 + shift
    scale, _ = search_scale(x, spec)
    least, best = min(_errors(x, spec).values())
    chosen = {s: e for e, s in _errors(x, spec).values()}[scale.item()]
    assert scale.item() == best or chosen <= least * (1 + 1e-6)
    assert scale < range_to_scale(x.min()[None], x.max()[None], spec)[0]  # it did clip


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("axis", [0, 1])
def test_every_channel_is_searched_for_itself(spec, axis):
    x = torch.randn(6, 5, 3, 3) * torch.rand(6, 5, 1, 1)
    together = search_scale(x, dataclasses.replace(spec, axis=axis))
    for channel in range(x.shape[axis]):
        alone = search_scale(x.select(axis, channel), spec)
        assert together[0][channel] == alone[0].item()
        assert together[1][channel] == alone[1].item()


def test_search_holds_a_bounded_chunk(monkeypatch):
    x = torch.randn(4, 1000)
    spec = QuantSpec(3, axis=0)
    whole = search_scale(x, spec)
    sizes = []

    def spy(part, *args):
        sizes.append(part.numel())
        return to_grid(part, *args)

    monkeypatch.setattr(observer, "CHUNK", 64)
    monkeypatch.setattr(observer, "to_grid", spy)
    assert torch.equal(search_scale(x, spec)[0], whole[0])
    assert max(sizes) <= 64


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_search_works_at_any_magnitude(size):
    x = torch.randn(500)
    spec = QuantSpec(3)
    found = search_scale(x * size, spec)[0] / size
    torch.testing.assert_close(found, search_scale(x, spec)[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("spec", SPECS)
def test_search_of_zeros_gives_a_positive_scale(spec):
    scale, zero_point = search_scale(torch.zeros(10), spec)
    assert 0 < scale.item() < float("inf")
    assert to_grid(torch.zeros(1), scale, zero_point, spec).abs().item() < 1e-15


def test_sample_is_bounded_and_its_range_is_of_all_values():
    sample = Sample(100, torch.Generator().manual_seed(1))
    x = torch.rand(5, 1000)
    x[3, 17] = 50.0
    for part in x:
        sample.add(part)
    assert sum(part.numel() for part in sample.parts) == 500
    assert sample.span()[0].item() == x.min()
    assert sample.span()[1].item() == 50.0


def test_sample_of_a_small_tensor_is_the_tensor():
    x = torch.randn(3, 4, 5)
    sample = Sample(60, torch.Generator())
    sample.add(x)
    spec = QuantSpec(4)
    assert torch.equal(sample.search(spec)[0], search_scale(x, spec)[0])


def test_sample_does_not_favor_a_column():
    columns = torch.arange(64.0).expand(512, 64)
    sample = Sample(4096, torch.Generator().manual_seed(0))
    sample.add(columns)
    counts = torch.bincount(sample.parts[0].long(), minlength=64)
    assert counts.min() > 30  # 64 expected in each
    assert counts.max() < 110

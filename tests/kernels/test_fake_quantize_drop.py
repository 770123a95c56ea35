"""QDrop in fake_quantize: which elements stay as they are, on every backend the same."""

import math

import pytest
import torch

from dfq_kernels import fake_quantize
from dfq_kernels.fake_quantize import philox


def _dropped(seed, drop, shape):
    """Where a tensor far off the grid is left as it is."""
    x = torch.full(shape, 100.0, requires_grad=True)
    y = fake_quantize(x, torch.ones(1), torch.zeros(1), -8, 7, drop=drop, seed=torch.tensor(seed))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx == 1, y == 100)  # the same mask backward
    assert torch.equal(dx == 0, y == 7)
    return y == 100


def test_drop_follows_philox(backend):
    words = philox(torch.tensor(2**50 + 3), torch.arange(250)).flatten()
    expected = (words.double() / 2**32 < 0.3).view(40, 25)
    assert torch.equal(_dropped(2**50 + 3, 0.3, (40, 25)), expected)


@pytest.mark.parametrize("drop", [0.5, 0.1])
def test_drop_has_its_probability_everywhere(drop):
    """Chi-square over the patterns of eight neighbours, and over positions in a block of 16."""
    dropped = _dropped(1234, drop, (2**18,))
    patterns = (dropped.view(-1, 8).long() * 2 ** torch.arange(8)).sum(1).bincount(minlength=256)
    ones = torch.tensor([i.bit_count() for i in range(256)])
    expected = patterns.sum() * drop**ones * (1 - drop) ** (8 - ones)
    frequent = expected >= 5
    chi2 = ((patterns - expected) ** 2 / expected)[frequent].sum().item()
    freedom = int(frequent.sum())
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)
    columns = dropped.view(-1, 16).double().sum(0)
    spread = (columns - 2**14 * drop) ** 2 / (2**14 * drop * (1 - drop))
    assert abs(spread.sum().item() - 16) < 5 * math.sqrt(32)


def test_another_seed_drops_others(backend):
    first, second = _dropped(1, 0.5, (10_000,)), _dropped(2, 0.5, (10_000,))
    assert 4_600 < (first == second).sum() < 5_400


def test_drop_of_everything_is_the_identity(backend):
    x = torch.randn(1000)
    y = fake_quantize(x, torch.ones(1), torch.zeros(1), -8, 7, drop=1.0, seed=torch.tensor(0))
    assert torch.equal(x, y)


def test_drop_counts_in_memory_order(backend):
    x = torch.full((2, 3, 4, 5), 100.0)
    args, options = (torch.ones(1), torch.zeros(1), -8, 7), {"drop": 0.5, "seed": torch.tensor(7)}
    flat = fake_quantize(x.flatten(), *args, **options)
    last = fake_quantize(x.contiguous(memory_format=torch.channels_last), *args, **options)
    assert torch.equal(last.permute(0, 2, 3, 1).flatten(), flat)

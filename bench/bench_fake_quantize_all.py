"""fake_quantize_all on the weights of ResNet-20 against a call of fake_quantize for each."""

from functools import partial

import pytest
import torch

from bench.harness import Baseline, Case
from bench.settings import DEVICE
from dfq_kernels import fake_quantize, fake_quantize_all
from dfq_kernels.fake_quantize_all import fake_quantize_all_reference

WIDTHS = (16, 32, 64)
SHAPES = [
    (16, 3, 3, 3),
    *((16, 16, 3, 3) for _ in range(6)),
    *((width, width // 2, 3, 3) for width in WIDTHS[1:]),
    *((width, width, 3, 3) for width in WIDTHS[1:] for _ in range(5)),
    (10, 64),
]


@pytest.fixture
def weights():
    """xs, scales, zero_points, quant_mins, quant_maxs; 4 bits."""
    xs = [torch.randn(shape, device=DEVICE) for shape in SHAPES]
    scales = [torch.rand(len(x), device=DEVICE) * 0.1 + 0.05 for x in xs]
    zero_points = [torch.zeros(len(x), device=DEVICE) for x in xs]
    return xs, scales, zero_points, [-8] * len(xs), [7] * len(xs)


def one_by_one(*lists):
    return [fake_quantize(*args, axis=0) for args in zip(*lists, strict=True)]


def check(lists):
    expected = fake_quantize_all_reference(*lists)
    torch.testing.assert_close(fake_quantize_all(*lists), expected, rtol=0, atol=0)


def case(lists, run, baseline, **fields):
    return Case(
        op="fake_quantize_all",
        size="ResNet-20 weights fp32",
        run=run,
        check=partial(check, lists),
        baselines={"one by one": Baseline(baseline, 1, 1)},
        elements=sum(x.numel() for x in lists[0]),
        **fields,
    )


def test_forward(measure, weights):
    run, baseline = (partial(f, *weights) for f in (fake_quantize_all, one_by_one))
    measure(case(weights, run, baseline, name="forward"))


def test_forward_and_backward(measure, weights):
    inputs = [tensor.requires_grad_() for tensor in (*weights[0], *weights[1])]
    grads = [torch.randn_like(x) for x in weights[0]]

    def both(function):
        return torch.autograd.grad(function(*weights), inputs, grads)

    run, baseline = (partial(both, f) for f in (fake_quantize_all, one_by_one))
    ops = ("fake_quantize_all", "fake_quantize_all_backward")
    measure(case(weights, run, baseline, name="forward + backward", ops=ops))

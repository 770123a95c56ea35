"""batch_norm against what it replaces: var_mean, F.batch_norm and relu through autograd.

An activation of ResNet-18, [32, 64, 56, 56], in both layouts unless a case says otherwise.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench.harness import TINY, compare
from dfq_kernels import _backend, batch_norm, batch_norm_statistics
from dfq_kernels.batch_norm import batch_norm_backward_reference, batch_norm_reference

SHAPE = (2, 4, 6, 6) if TINY else (32, 64, 56, 56)
OTHERS = {
    "ResNet-20 16x32x32": (128, 16, 32, 32),
    "ResNet-18 512x7x7": (32, 512, 7, 7),
    "MobileNetV2 144x28x28": (32, 144, 28, 28),
}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
EPS = 1e-5

both_layouts = pytest.mark.parametrize("layout", LAYOUTS)


def case(layout, shape=SHAPE, dtype=torch.float32):
    """x, the parameters of the op up to bias, and gradients of its outputs."""
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    running_mean, weight, bias, grad_mean, grad_var = torch.randn(5, shape[1])
    parameters = (running_mean, torch.rand(shape[1]) + 0.5, weight, bias)
    check(x, parameters)
    return x, parameters, (torch.randn_like(x), grad_mean, grad_var)


def check(x, parameters):
    """The gate: y and its gradient bit for bit, the statistics but for rounding."""
    args = (x, *parameters, EPS, True)
    y, *statistics = _backend.implementation("batch_norm", "cpu")(*args)
    expected_y, *expected = batch_norm_reference(*args)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=0)
    torch.testing.assert_close(statistics, expected, rtol=2e-7, atol=2e-7)
    args = (torch.randn_like(x), *statistics, x, statistics[0], *parameters, EPS, True, False)
    grad_x = _backend.implementation("batch_norm_backward", "cpu")(*args)[0]
    expected_grad = batch_norm_backward_reference(*args)[0]
    torch.testing.assert_close(grad_x, expected_grad, rtol=0, atol=0)


def composite(x, running_mean, running_var, weight, bias):
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, EPS)
    return y.relu(), mean, var


def step(forward, x, parameters, grads):
    """A run of forward and backward, with gradients of x, weight and bias."""
    inputs = [value.detach().requires_grad_() for value in (x, *parameters[2:])]
    args = (inputs[0], *parameters[:2], *inputs[1:])
    return lambda: torch.autograd.grad(forward(*args), inputs, grads)


fused = partial(batch_norm, eps=EPS, relu=True)


@both_layouts
def test_forward_and_backward(benchmark, layout):
    x, *rest = case(layout)
    baselines = {"var_mean + batch_norm + relu": (step(composite, x, *rest), 4)}
    compare(benchmark, step(fused, x, *rest), baselines, elements=x.numel())


@pytest.mark.parametrize("shape", OTHERS.values(), ids=OTHERS)
@both_layouts
def test_forward_and_backward_of(benchmark, layout, shape):
    x, *rest = case(layout, SHAPE if TINY else shape)
    baselines = {"var_mean + batch_norm + relu": (step(composite, x, *rest), 4)}
    compare(benchmark, step(fused, x, *rest), baselines, elements=x.numel())


@both_layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_forward_and_backward_in(benchmark, layout, dtype):
    x, *rest = case(layout, dtype=dtype)
    wide = case(layout)
    # 1 is the aim for bfloat16; a tenth is left to the noise of the clock
    baselines = {"ours in fp32": (step(fused, *wide), 0.9 if dtype == torch.bfloat16 else None)}
    compare(benchmark, step(fused, x, *rest), baselines, elements=x.numel())


@both_layouts
def test_forward(benchmark, layout):
    x, parameters, _ = case(layout)
    baselines = {
        "var_mean + batch_norm + relu": (partial(composite, x, *parameters), None),
        "clone": (x.clone, None),
    }
    compare(benchmark, partial(fused, x, *parameters), baselines, elements=x.numel())


@both_layouts
def test_statistics(benchmark, layout):
    x, parameters, _ = case(layout)
    training = partial(torch.native_batch_norm, x, None, None, None, None, True, 0.0, EPS)
    baselines = {
        "var_mean": (partial(torch.var_mean, x, (0, 2, 3), correction=0), None),
        "native_batch_norm": (training, None),
    }
    run = partial(batch_norm_statistics, x, parameters[0])
    compare(benchmark, run, baselines, elements=x.numel())


@both_layouts
def test_loss_on_statistics(benchmark, layout):
    """Forward and backward of a loss that looks at mean and var alone, as BN matching does."""
    x, parameters, (_, *grads) = case(layout)
    leaf = x.detach().requires_grad_()

    def ours():
        return torch.autograd.grad(batch_norm_statistics(leaf, parameters[0]), leaf, grads)

    def aten():
        return torch.autograd.grad(torch.var_mean(leaf, (0, 2, 3), correction=0), leaf, grads[::-1])

    compare(benchmark, ours, {"var_mean": (aten, None)}, elements=x.numel())

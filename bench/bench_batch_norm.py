"""batch_norm against what it replaces: var_mean, F.batch_norm and relu through autograd.

An activation of ResNet-18, [32, 64, 56, 56], in both layouts unless a case says otherwise; on a
GPU also one eight times as large.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench.harness import Baseline, Case, against_compile, choose, describe, run_op
from bench.settings import DEVICE, TINY
from dfq_kernels import batch_norm, batch_norm_statistics
from dfq_kernels.batch_norm import (
    batch_norm_backward_reference,
    batch_norm_reference,
    batch_norm_statistics_backward_reference,
)

SHAPES = choose(tiny=(2, 4, 6, 6), usual=(32, 64, 56, 56), large=(256, 64, 56, 56))
OTHERS = {
    "ResNet-20": (128, 16, 32, 32),
    "ResNet-18": (32, 512, 7, 7),
    "MobileNetV2": (32, 144, 28, 28),
}
if TINY:
    OTHERS = {"ResNet-20": SHAPES[0]}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-5
BOTH = ("batch_norm", "batch_norm_backward")
STATISTICS = ("batch_norm_statistics", "batch_norm_statistics_backward")

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def tensors(layout, shape, dtype=torch.float32):
    """x, the parameters of the op up to bias, and gradients of its outputs."""
    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    running_mean, weight, bias, *grads = torch.randn(5, shape[1], device=DEVICE)
    running_var = torch.rand(shape[1], device=DEVICE) + 0.5
    return x, (running_mean, running_var, weight, bias), (torch.randn_like(x), *grads)


def check(x, parameters):
    """The gate: y and its gradient bit for bit, the statistics but for rounding."""
    args = (x, *parameters, EPS, True)
    y, mean, var = run_op("batch_norm", *args)
    torch.testing.assert_close(y, batch_norm_reference(*args)[0], rtol=0, atol=0)
    check_statistics(x, mean, var)
    grad_y = torch.randn_like(x)
    args = (grad_y, mean, var, x, mean, *parameters, EPS, True, True)
    grad_x, *sums = run_op("batch_norm_backward", *args)
    expected_x, *expected = batch_norm_backward_reference(*args)
    torch.testing.assert_close(grad_x, expected_x, rtol=0, atol=0)
    terms = 16 * grad_y.double().abs().sum((0, 2, 3)).max().item()
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-7 * terms)


def check_statistics(x, mean, var):
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(
        [mean.double(), var.double()], [exact_mean, exact_var], rtol=2e-7, atol=2e-7
    )


def composite(x, running_mean, running_var, weight, bias):
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, EPS)
    return y.relu(), mean.float(), var.float()


def step(forward, x, parameters, grads):
    """A run of forward and backward, with gradients of x, weight and bias."""
    inputs = [value.detach().requires_grad_() for value in (x, *parameters[2:])]
    args = (inputs[0], *parameters[:2], *inputs[1:])
    return lambda: torch.autograd.grad(forward(*args), inputs, grads)


def backward_of(forward, x, parameters, grads):
    """A run of the backward alone."""
    inputs = [value.detach().requires_grad_() for value in (x, *parameters[2:])]
    # a compiled function would write its gradients over what the next run needs
    with torch._functorch.config.patch(donated_buffer=False):
        outputs = forward(inputs[0], *parameters[:2], *inputs[1:])
        torch.autograd.grad(outputs, inputs, grads, retain_graph=True)
    return partial(torch.autograd.grad, outputs, inputs, grads, retain_graph=True)


fused = partial(batch_norm, eps=EPS, relu=True)


def case(x, **fields):
    return Case(size=describe(x), elements=x.numel(), **fields)


@shapes
@dtypes
@layouts
def test_forward_and_backward(measure, layout, dtype, shape):
    x, *rest = tensors(layout, shape, dtype)
    aim = 4 if dtype == torch.float32 else None
    baselines = {"eager composite": Baseline(step(composite, x, *rest), aim)}
    baselines |= against_compile(x, composite, lambda fast: step(fast, x, *rest))
    if dtype != torch.float32:
        wide = step(fused, *tensors(layout, shape))
        # 1 is the aim for bfloat16; a tenth is left to the noise of the clock
        baselines["ours in fp32"] = Baseline(wide, 0.9 if dtype == torch.bfloat16 else None)
    measure(
        case(
            x,
            op="batch_norm",
            name="forward + backward through autograd",
            run=step(fused, x, *rest),
            check=partial(check, x, rest[0]),
            baselines=baselines,
            bytes=5 * x.nbytes,
            ops=BOTH,
        )
    )


@pytest.mark.parametrize("network", OTHERS)
@layouts
def test_forward_and_backward_of(measure, layout, network):
    x, *rest = tensors(layout, OTHERS[network])
    measure(
        case(
            x,
            op="batch_norm",
            name=f"forward + backward, of {network}",
            run=step(fused, x, *rest),
            check=partial(check, x, rest[0]),
            baselines={"eager composite": Baseline(step(composite, x, *rest), 4)},
            bytes=5 * x.nbytes,
            ops=BOTH,
        )
    )


@shapes
@layouts
def test_forward(measure, layout, shape):
    x, parameters, _ = tensors(layout, shape)
    measure(
        case(
            x,
            op="batch_norm",
            name="forward",
            run=partial(fused, x, *parameters),
            check=partial(check, x, parameters),
            baselines={
                "eager composite": Baseline(partial(composite, x, *parameters)),
                **against_compile(x, composite, lambda fast: partial(fast, x, *parameters)),
                "clone": Baseline(x.clone),
            },
            bytes=2 * x.nbytes,
        )
    )


@shapes
@layouts
def test_backward(measure, layout, shape):
    x, parameters, grads = tensors(layout, shape)
    mean = x.float().mean((0, 2, 3))
    args = (*grads, x, mean, *parameters, EPS, True, True)
    plain = backward_of(composite, x, parameters, grads)
    compiled = against_compile(x, composite, lambda fast: backward_of(fast, x, parameters, grads))
    measure(
        case(
            x,
            op="batch_norm_backward",
            name="backward, with gradients of weight and bias",
            run=partial(run_op, "batch_norm_backward", *args),
            check=partial(check, x, parameters),
            baselines={
                "eager composite": Baseline(plain),
                **compiled,
            },
            bytes=3 * x.nbytes,
        )
    )


@shapes
@layouts
def test_statistics(measure, layout, shape):
    x, parameters, _ = tensors(layout, shape)
    training = partial(torch.native_batch_norm, x, None, None, None, None, True, 0.0, EPS)
    var_mean = partial(torch.var_mean, dim=(0, 2, 3), correction=0)
    measure(
        case(
            x,
            op="batch_norm_statistics",
            name="mean and var alone",
            run=partial(batch_norm_statistics, x, parameters[0]),
            check=lambda: check_statistics(x, *batch_norm_statistics(x, parameters[0])),
            baselines={
                "ATen var_mean": Baseline(partial(var_mean, x)),
                "native_batch_norm": Baseline(training),
                **against_compile(x, var_mean, lambda fast: partial(fast, x)),
            },
            bytes=x.nbytes,
        )
    )


@shapes
@layouts
def test_loss_on_statistics(measure, layout, shape):
    """Forward and backward of a loss that looks at mean and var alone, as BN matching does."""
    x, parameters, (_, *grads) = tensors(layout, shape)
    leaf = x.detach().requires_grad_()

    def ours():
        return torch.autograd.grad(batch_norm_statistics(leaf, parameters[0]), leaf, grads)

    def aten():
        return torch.autograd.grad(torch.var_mean(leaf, (0, 2, 3), correction=0), leaf, grads[::-1])

    measure(
        case(
            x,
            op="batch_norm_statistics",
            name="forward + backward of a loss on mean and var",
            run=ours,
            check=lambda: check_loss(leaf, parameters[0], grads, ours),
            baselines={"ATen var_mean": Baseline(aten)},
            bytes=4 * x.nbytes,
            ops=STATISTICS,
        )
    )


def check_loss(leaf, running_mean, grads, run):
    mean, var = (value.detach() for value in batch_norm_statistics(leaf, running_mean))
    check_statistics(leaf.detach(), mean, var)
    expected = batch_norm_statistics_backward_reference(*grads, leaf.detach(), mean)
    torch.testing.assert_close(run()[0], expected, rtol=0, atol=0)

"""fake_quantize against ATen, the eager composite, torch.compile, and QDrop in separate ops.

1.6 million elements, the size of an activation of ResNet-18, unless a case says otherwise.
"""

import time
from functools import partial

import pytest
import torch

from bench.harness import TINY, compare, threads
from dfq_kernels import _backend, fake_quantize
from dfq_kernels.fake_quantize import fake_quantize_backward_reference, fake_quantize_reference

SHAPE = (2, 16, 5, 5) if TINY else (8, 64, 56, 56)
WEIGHT = (16, 50) if TINY else (512, 3136)
LARGE = 1000 if TINY else 12_800_000
BOUNDS = (-8, 7)
PLAIN = (None, 0.0, None)  # axis, drop, seed
NEEDS = (True, True, True)

aten_learnable = torch._fake_quantize_learnable_per_tensor_affine
aten_backward = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward
aten_channel_backward = torch.ops.aten._fake_quantize_learnable_per_channel_affine_backward


def composite(x, scale, zero_point, quant_min, quant_max):
    ratio = x * (1 / scale)
    code = ratio + (ratio.round() - ratio).detach() + zero_point
    return (code.clamp(quant_min, quant_max) - zero_point) * scale


def composite_forward(x, scale, zero_point, quant_min, quant_max):
    code = (torch.round(x * (1 / scale)) + zero_point).clamp(quant_min, quant_max)
    return (code - zero_point) * scale


def composite_backward(grad, x, scale, zero_point, shape):
    """A run of the composite's backward alone."""
    inputs = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    y = composite(inputs[0], inputs[1].view(shape), inputs[2].view(shape), *BOUNDS)
    return partial(torch.autograd.grad, y, inputs, grad, retain_graph=True)


def tensor_case(dtype=torch.float32):
    return torch.randn(SHAPE).to(dtype), torch.tensor([0.1]), torch.zeros(1)


CHANNEL_CASES = {"weights": 0, "NCHW": 1, "channels_last": 1}


def channel_case(layout):
    """x, scale, zero_point, axis, and the shape that broadcasts scale."""
    x = torch.randn(WEIGHT if layout == "weights" else SHAPE)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    axis = CHANNEL_CASES[layout]
    shape = [1] * x.ndim
    shape[axis] = channels = x.shape[axis]
    return x, torch.rand(channels) * 0.1 + 0.05, torch.zeros(channels), axis, shape


def check_forward(args):
    ours = _backend.implementation("fake_quantize", "cpu")(*args)
    torch.testing.assert_close(ours, fake_quantize_reference(*args), rtol=0, atol=0)


def check_backward(args):
    ours = _backend.implementation("fake_quantize_backward", "cpu")(*args)
    expected = fake_quantize_backward_reference(*args)
    torch.testing.assert_close(ours[0], expected[0], rtol=0, atol=0)
    terms = args[0].double().abs().sum().item() * 16
    torch.testing.assert_close(ours[1:], expected[1:], rtol=1e-6, atol=1e-7 * terms)


def test_forward(benchmark):
    x, scale, zero_point = tensor_case()
    check_forward((x, scale, zero_point, *BOUNDS, *PLAIN))
    baselines = {
        "ATen": (lambda: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, *BOUNDS), 15),
        "eager composite": (lambda: composite_forward(x, scale, zero_point, *BOUNDS), 4),
        "clone": (x.clone, None),
    }
    if not TINY:  # compiling takes longer than all the rest
        compiled = torch.compile(composite_forward, dynamic=False)
        baselines["torch.compile"] = (lambda: compiled(x, scale, zero_point, *BOUNDS), None)
    run = partial(fake_quantize, x, scale, zero_point, *BOUNDS)
    compare(benchmark, run, baselines, elements=x.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_forward_in(benchmark, dtype):
    x, scale, zero_point = tensor_case(dtype)
    check_forward((x, scale, zero_point, *BOUNDS, *PLAIN))
    wide = partial(fake_quantize, x.float(), scale, zero_point, *BOUNDS)
    # 1 is the aim for bfloat16; a tenth is left to the noise of the clock
    baselines = {"ours in fp32": (wide, 0.9 if dtype == torch.bfloat16 else None)}
    run = partial(fake_quantize, x, scale, zero_point, *BOUNDS)
    compare(benchmark, run, baselines, elements=x.numel())


@pytest.mark.parametrize("layout", CHANNEL_CASES)
def test_forward_per_channel(benchmark, layout):
    x, scale, zero_point, axis, shape = channel_case(layout)
    check_forward((x, scale, zero_point, *BOUNDS, axis, 0.0, None))
    views = scale.view(shape), zero_point.view(shape)
    aten = partial(
        torch.fake_quantize_per_channel_affine, x, scale, zero_point.int(), axis, *BOUNDS
    )
    baselines = {
        "ATen": (aten, 10),
        "eager composite": (lambda: composite_forward(x, *views, *BOUNDS), 4),
    }
    run = partial(fake_quantize, x, scale, zero_point, *BOUNDS, axis=axis)
    compare(benchmark, run, baselines, elements=x.numel())


def test_backward(benchmark):
    x, scale, zero_point = tensor_case()
    grad = torch.randn_like(x)
    args = (grad, x, scale, zero_point, *BOUNDS)
    check_backward((*args, *PLAIN, *NEEDS))
    baselines = {
        "ATen learnable": (lambda: aten_backward(*args, 1.0), 15),
        "eager composite": (composite_backward(*args[:4], [1] * 4), 4),
    }
    run = partial(_backend.implementation("fake_quantize_backward", "cpu"), *args, *PLAIN, *NEEDS)
    compare(benchmark, run, baselines, elements=x.numel())


def test_backward_in_bf16(benchmark):
    x, scale, zero_point = tensor_case(torch.bfloat16)
    grad = torch.randn_like(x)
    grid = (scale, zero_point, *BOUNDS, *PLAIN, *NEEDS)
    check_backward((grad, x, *grid))
    backward = _backend.implementation("fake_quantize_backward", "cpu")
    baselines = {"ours in fp32": (partial(backward, grad.float(), x.float(), *grid), None)}
    compare(benchmark, partial(backward, grad, x, *grid), baselines, elements=x.numel())


@pytest.mark.parametrize("layout", CHANNEL_CASES)
def test_backward_per_channel(benchmark, layout):
    x, scale, zero_point, axis, shape = channel_case(layout)
    grad = torch.randn_like(x)
    args = (grad, x, scale, zero_point)
    check_backward((*args, *BOUNDS, axis, 0.0, None, *NEEDS))
    baselines = {
        "ATen learnable": (lambda: aten_channel_backward(*args, axis, *BOUNDS, 1.0), 10),
        "eager composite": (composite_backward(*args, shape), 4),
    }
    backward = _backend.implementation("fake_quantize_backward", "cpu")
    run = partial(backward, *args, *BOUNDS, axis, 0.0, None, *NEEDS)
    compare(benchmark, run, baselines, elements=x.numel())


def test_forward_and_backward(benchmark):
    """Through autograd, with everything that Python adds."""
    x, scale, zero_point = tensor_case()
    grad = torch.randn_like(x)
    check_backward((grad, x, scale, zero_point, *BOUNDS, *PLAIN, *NEEDS))
    inputs = [x.requires_grad_(), scale.requires_grad_()]

    def both(function):
        y = function(x, scale, zero_point, *BOUNDS)
        return torch.autograd.grad(y, inputs, grad)

    baselines = {"eager composite": (partial(both, composite), 4)}
    if not TINY:
        compiled = torch.compile(composite, dynamic=False)
        baselines["torch.compile"] = (partial(both, compiled), None)
    compare(benchmark, partial(both, fake_quantize), baselines, elements=x.numel())


def test_drop_forward_and_backward(benchmark):
    """What QDrop takes through autograd: fake-quant, rand and where."""
    x, scale, zero_point = tensor_case()
    seed, grad = torch.tensor([7]), torch.randn_like(x)
    check_forward((x, scale, zero_point, *BOUNDS, None, 0.5, seed))
    check_backward((grad, x, scale, zero_point, *BOUNDS, None, 0.5, seed, *NEEDS))
    inputs = [x.requires_grad_(), scale.requires_grad_()]

    def fused():
        y = fake_quantize(x, scale, zero_point, *BOUNDS, drop=0.5, seed=seed)
        return torch.autograd.grad(y, inputs, grad)

    def separate():
        y = aten_learnable(x, scale, zero_point, *BOUNDS, 1.0)
        return torch.autograd.grad(torch.where(torch.rand_like(x) < 0.5, x, y), inputs, grad)

    compare(benchmark, fused, {"ATen + rand + where": (separate, 10)}, elements=x.numel())


def test_large_forward_on_two_threads(benchmark):
    x, scale, zero_point = torch.randn(LARGE), torch.tensor([0.1]), torch.zeros(1)
    check_forward((x, scale, zero_point, *BOUNDS, *PLAIN))
    run = partial(fake_quantize, x, scale, zero_point, *BOUNDS)
    baselines = {"clone": (x.clone, 1 / 1.5)}
    with threads(2):
        compare(benchmark, run, baselines, elements=LARGE, clock=time.perf_counter)

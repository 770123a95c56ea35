"""Every op through autograd on a GPU: repeatable, never waiting, in CUDA graphs, in large."""

from dataclasses import dataclass

import pytest
import torch
from on_gpu import CUDA, DEVICE, DRY_RUN, LAYOUTS, MARKS, backends, use, variant
from torch import Tensor

from dfq_kernels import batch_norm, batch_norm_statistics, fake_quantize, fake_quantize_all

pytestmark = MARKS


@dataclass(frozen=True)
class Tensors:
    """What the steps below take; x, scale, weight and bias are learned."""

    x: Tensor  # [B, C, H, W]
    grad: Tensor  # [B, C, H, W]
    scale: Tensor  # [C], and so the rest
    weight: Tensor
    bias: Tensor
    fixed: Tensor
    seed: Tensor  # [1]


def _tensors(layout="contiguous"):
    shape = (2, 3, 5, 4) if DRY_RUN else (32, 48, 57, 56)
    x, grad = (LAYOUTS[layout](torch.randn(shape, device=DEVICE)) for _ in range(2))
    scale, fixed = torch.rand(2, shape[1], device=DEVICE) + 0.1
    weight, bias = torch.randn(2, shape[1], device=DEVICE)
    learned = [t.clone().requires_grad_() for t in (x, scale, weight, bias)]
    seed = torch.tensor([3], device=DEVICE)
    return Tensors(learned[0], grad, *learned[1:], fixed, seed)


# Each gives outputs, the tensors whose gradient is taken, and gradients of the outputs.


def _fake_quantize(t):
    y = fake_quantize(t.x, t.scale, t.fixed, -8, 7, axis=1, drop=0.5, seed=t.seed)
    return [y], [t.x, t.scale], [t.grad]


def _fake_quantize_all(t):
    of_all, zero = t.fixed[:1], torch.zeros_like(t.fixed[:1])
    ys = fake_quantize_all([t.x, t.weight], [of_all, t.scale], [zero, t.fixed], [-8, -2], [7, 1])
    return ys, [t.x, t.weight, t.scale], [t.grad, t.fixed]


def _batch_norm(t):
    outputs = batch_norm(t.x, t.fixed, t.fixed, t.weight, t.bias, relu=True)
    return outputs, [t.x, t.weight, t.bias], [t.grad, t.fixed, t.fixed]


def _batch_norm_statistics(t):
    return batch_norm_statistics(t.x, t.fixed), [t.x], [t.fixed, t.fixed]


STEPS = {
    "fake_quantize": _fake_quantize,
    "fake_quantize_all": _fake_quantize_all,
    "batch_norm": _batch_norm,
    "batch_norm_statistics": _batch_norm_statistics,
}
ops = pytest.mark.parametrize("op", STEPS)


def _run(op, tensors, step=None):
    """Outputs and gradients of a forward and a backward."""
    outputs, inputs, grads = (step or STEPS[op])(tensors)
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def _use(backend, op):
    return use(backend, op, f"{op}_backward")


@backends
@ops
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_same_bits_again(backend, op, layout):
    with _use(backend, op):
        tensors = _tensors(layout)
        first = _run(op, tensors)
        for _ in range(1 if DRY_RUN else 3):
            torch.testing.assert_close(_run(op, tensors), first, rtol=0, atol=0)
        if CUDA:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.testing.assert_close(_run(op, tensors), first, rtol=0, atol=0)


@pytest.mark.skipif(not CUDA, reason="on a CPU there is nobody to wait for")
@backends
@ops
def test_waits_for_nothing(backend, op):
    with _use(backend, op):
        tensors = _tensors()
        _run(op, tensors)  # the first run compiles
        try:
            torch.cuda.set_sync_debug_mode("error")
            _run(op, tensors)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not CUDA, reason="a CPU has no such graphs")
@backends
@ops
def test_in_a_cuda_graph(backend, op):
    """Captured once and replayed on other values, seed among them: what eager mode gives."""
    with _use(backend, op):
        tensors = _tensors()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _run(op, tensors)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _run(op, tensors)
        with torch.no_grad():
            for values in (tensors.x, tensors.grad, tensors.weight):
                values.copy_(torch.randn_like(values))
            tensors.seed.add_(1)
        graph.replay()
        torch.testing.assert_close(captured, _run(op, tensors), rtol=0, atol=0)


@backends
@ops
def test_compiles_into_one_graph(backend, op):
    with _use(backend, op):
        tensors = _tensors()
        torch.compiler.reset()
        step = torch.compile(STEPS[op], fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(_run(op, tensors, step), _run(op, tensors), rtol=0, atol=0)


# More elements than a 32-bit offset reaches: bfloat16, so 4 GB a tensor. shape, axis of the scales
ENDS = {
    "flat": ((2**31 + 4097,), None),
    "rows": ((3, 2**30), 0),
    "columns": ((2**20 + 3, 2**11), 1),
}


def _end(x, layout):
    """The last elements, of every channel."""
    return x[-2:] if layout == "columns" else x[..., -2:]


def _large(shape):
    if CUDA and torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("takes 40 GB of memory on the GPU")
    small = [min(size, 5) for size in shape]
    return torch.randn(small if DRY_RUN else shape, device=DEVICE, dtype=torch.bfloat16)


@backends
@pytest.mark.parametrize("layout", ENDS)
def test_the_end_of_a_large_fake_quantize(backend, layout):
    shape, axis = ENDS[layout]
    x = _large(shape)
    scale = torch.rand(1 if axis is None else x.shape[axis], device=DEVICE) + 0.1
    args = (scale, torch.zeros_like(scale), -8, 7, axis, 0.0, None)
    forward, backward = (variant(f"fake_quantize{end}", backend) for end in ("", "_backward"))
    end = _end(x, layout)
    expected = forward(end, *args)
    torch.testing.assert_close(_end(forward(x, *args), layout), expected, rtol=0, atol=0)
    expected, *_ = backward(end, end, *args, True, True, True)
    dx, *_ = backward(x, x, *args, True, True, True)
    torch.testing.assert_close(_end(dx, layout), expected, rtol=0, atol=0)


@backends
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_the_end_of_a_large_batch_norm(backend, layout):
    x = _large(ENDS[layout][0])
    x = x[None] if layout == "rows" else x  # [1, C, L] or [B, C]
    running_mean, weight, bias = torch.randn(3, x.shape[1], device=DEVICE)
    parameters = (running_mean, torch.ones_like(weight), weight, bias, 1e-5, True)
    forward, backward = (variant(f"batch_norm{end}", backend) for end in ("", "_backward"))
    end = _end(x, layout)
    expected, *_ = forward(end, *parameters)
    y, *_ = forward(x, *parameters)
    torch.testing.assert_close(_end(y, layout), expected, rtol=0, atol=0)
    del y
    expected, *_ = backward(end, None, None, end, running_mean, *parameters, False)
    dx, *_ = backward(x, None, None, x, running_mean, *parameters, False)
    torch.testing.assert_close(_end(dx, layout), expected, rtol=0, atol=0)

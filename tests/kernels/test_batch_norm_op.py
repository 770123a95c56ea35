"""batch_norm as an op: gradients, passes over memory, torch.compile, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from batch_norm_cases import EPS, assert_as_good, dims, statistics64, tensors
from torch.utils._python_dispatch import TorchDispatchMode

from dfq_kernels import batch_norm, batch_norm_statistics


def _composite(x, running_mean, running_var, weight, bias, relu):
    var, mean = torch.var_mean(x, dims(x), correction=0)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, EPS)
    return (y.relu() if relu else y), mean, var


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_gradients_are_those_of_the_composite(backend, layout, relu, affine):
    channels = 12 if backend == "compiled" else 2
    x, (running_mean, running_var, weight, bias) = tensors((8, channels, 9, 5), layout=layout)
    cotangents = (torch.randn(x.shape), *torch.randn(2, channels))

    def gradients(function, dtype, *options):
        learned = (x, weight, bias) if affine else (x,)
        leaves = [value.detach().to(dtype).requires_grad_() for value in learned]
        values = (leaves[0], running_mean.to(dtype), running_var.to(dtype), *leaves[1:])
        values += () if affine else (None, None)
        outputs = function(*values, *options, relu)
        return torch.autograd.grad(outputs, leaves, [c.to(dtype) for c in cotangents])

    ours = gradients(batch_norm, torch.float32, EPS)
    reference = gradients(_composite, torch.float32)
    exact = gradients(_composite, torch.float64)
    for values in zip(ours, reference, exact, strict=True):
        assert_as_good(*values)


def test_gradients_of_the_statistics(backend):
    channels = 12 if backend == "compiled" else 2
    x, (running_mean, *_) = tensors((8, channels, 9, 5))
    weights = torch.randn(2, channels)

    def gradient(statistics, dtype):
        leaf = x.detach().to(dtype).requires_grad_()
        mean, var = statistics(leaf)
        loss = (weights[0] * (mean - 1) ** 2).sum() + (weights[1] * var).sum()
        return torch.autograd.grad(loss, leaf)[0]

    ours = gradient(lambda leaf: batch_norm_statistics(leaf, running_mean), torch.float32)
    assert_as_good(
        ours, gradient(statistics64, torch.float32), gradient(statistics64, torch.float64)
    )


class _Recorder(TorchDispatchMode):
    """Names of the ops that make or read a tensor as big as ``numel``."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [*args, *(result if isinstance(result, tuple) else (result,))]
        if any(isinstance(t, torch.Tensor) and t.numel() == self.numel for t in tensors):
            self.names.append(func.name().removeprefix("dfq::").removeprefix("dfq_C::"))
        return result


@pytest.mark.parametrize(
    ("outputs", "backward"),
    [
        ("y", "batch_norm_backward"),
        ("y mean var", "batch_norm_backward"),
        ("mean var", "batch_norm_statistics_backward"),
        ("var", "batch_norm_statistics_backward"),
    ],
)
def test_one_pass_each_way(outputs, backward):
    """Whatever outputs a loss uses: no full-size zeros, no copy, nothing but the two ops."""
    x, parameters = tensors((2, 3, 4, 5))
    x.requires_grad_()
    grads = {"y": torch.randn(x.shape), "mean": torch.randn(3), "var": torch.randn(3)}
    used = outputs.split()
    with _Recorder(x.numel()) as recorder:
        results = dict(zip(grads, batch_norm(x, *parameters, EPS, True), strict=True))
        torch.autograd.grad([results[name] for name in used], x, [grads[name] for name in used])
    names = [name for name in recorder.names if name not in ("aten::detach", "aten::view_as")]
    assert names == ["batch_norm", backward]


def test_opcheck(backend):
    if backend != "compiled":
        _opcheck(*tensors((5, 4), torch.bfloat16, "every second"))
        return
    for dtype in (torch.float32, torch.bfloat16):
        for layout in ("contiguous", "channels-last", "every second"):
            _opcheck(*tensors((2, 3, 4, 6), dtype, layout))


def _opcheck(x, parameters):
    running_mean, running_var, weight, bias = parameters
    x.requires_grad_()
    weight.requires_grad_()
    mean = torch.randn_like(running_mean)
    grad_y = torch.randn_like(x)
    ops, check = torch.ops.dfq, torch.library.opcheck
    check(ops.batch_norm, (x, running_mean, running_var, weight, None, EPS, True))
    check(ops.batch_norm_statistics, (x, running_mean))
    fixed = x.detach()
    affine = (running_mean, running_var, weight.detach(), bias, EPS, True)
    for learns in (True, False):
        check(ops.batch_norm_backward, (grad_y, mean, None, fixed, mean, *affine, learns))
    check(ops.batch_norm_statistics_backward, (None, mean, fixed, mean))


class _Layer(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(channels)

    def forward(self, x):
        norm = self.norm
        y, mean, var = batch_norm(
            x * 2, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, True
        )
        return y, mean.sum() + var.sum()


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_compiles_to_one_graph(backend, layout):
    x, _ = tensors((2, 3, 8, 8), layout=layout)
    layer = _Layer(3)

    def run(function):
        leaf = x.detach().requires_grad_()
        y, loss = function(leaf)
        inputs = (leaf, layer.norm.weight, layer.norm.bias)
        return [y, *torch.autograd.grad(y.sum() + loss, inputs)]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(layer), rtol=0, atol=0)


def test_exports_as_one_op():
    x, _ = tensors((2, 3, 8, 8))
    program = torch.export.export(_Layer(3), (x,))
    assert torch.ops.dfq.batch_norm.default in [node.target for node in program.graph.nodes]
    torch.testing.assert_close([*program.module()(x)], [*_Layer(3)(x)], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(3), r"\[B, C, ...\], got \[3\]"),
        ("x", torch.zeros(2, 3, dtype=torch.float64), "float32, float16 or bfloat16, got .*64"),
        ("running_mean", torch.zeros(4), r"running_mean must be \[3\].* got \[4\]"),
        ("running_var", torch.ones(1, 3), r"running_var must be \[3\].* got \[1, 3\]"),
        ("weight", torch.ones(3, dtype=torch.float16), "weight must be float32, got .*16"),
        ("bias", torch.zeros(2), r"bias must be \[3\].* got \[2\]"),
    ],
)
def test_refuses_what_does_not_fit(name, value, message):
    arguments = {"x": torch.zeros(2, 3), "running_mean": torch.zeros(3)}
    arguments |= {"running_var": torch.ones(3), name: value}
    with pytest.raises(ValueError, match=message):
        batch_norm(**arguments)
    if name in ("x", "running_mean"):
        with pytest.raises(ValueError, match=message):
            batch_norm_statistics(arguments["x"], arguments["running_mean"])

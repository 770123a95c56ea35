"""batch_norm and its backward: every backend against the reference, bit for bit."""

import pytest
import torch
from batch_norm_cases import (
    DTYPES,
    EPS,
    LAYOUTS,
    assert_backward,
    assert_bits,
    assert_forward,
    dims,
    reference,
    run,
    shapes,
    tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dfq_kernels import batch_norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_forward_is_the_reference(backend, layout, dtype):
    for shape in shapes(backend, layout):
        assert_forward(*tensors(shape, dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_is_the_reference(backend, layout, dtype):
    for shape in shapes(backend, layout):
        x, parameters = tensors(shape, dtype, layout)
        assert_backward(LAYOUTS[layout](torch.randn(shape).to(dtype)), x, parameters)


@pytest.mark.parametrize("learns", [True, False], ids=["learns", "frozen"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("given_grads", ["y", "y mean", "y var", "mean var", "mean", "var"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_backward_without_some_gradients(backend, layout, given_grads, relu, learns):
    channels = 10 if backend == "compiled" else 2
    x, parameters = tensors((3, channels, 6, 7), layout=layout)
    mean = x.mean(dims(x))
    grad_mean = torch.randn(channels) if "mean" in given_grads else None
    grad_var = torch.randn(channels) if "var" in given_grads else None
    if "y" in given_grads:
        op, arguments = "batch_norm_backward", (torch.randn(x.shape), grad_mean, grad_var, x, mean)
        arguments += (*parameters, EPS, relu, learns)
    else:
        op, arguments = "batch_norm_statistics_backward", (grad_mean, grad_var, x, mean)
    result, expected = run(op, *arguments), reference(op, *arguments)
    if isinstance(result, torch.Tensor):
        result, expected = [result], [expected]
    assert_bits(result[0], expected[0])
    assert all(a.shape == b.shape for a, b in zip(result, expected, strict=True))


def test_any_strides(backend):
    """x and grad_y each a slice of a permuted tensor, with strides of its own."""
    compiled = backend == "compiled"

    @settings(max_examples=60 if compiled else 10, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        sizes = st.integers(1, 20 if compiled else 5)
        shape = data.draw(st.lists(sizes, min_size=2, max_size=4), label="shape")
        dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
        x, grad_y = (_draw_strided(data, shape, label).to(dtype) for label in ("x", "grad_y"))
        _, parameters = tensors(shape)
        arguments = (x, *parameters, EPS, True)
        y, mean, var = run("batch_norm", *arguments)
        assert_bits(y, reference("batch_norm", *arguments)[0])
        arguments = (grad_y, mean, var, x, mean, *parameters, EPS, True, False)
        grad_x, *_ = run("batch_norm_backward", *arguments)
        assert_bits(grad_x, reference("batch_norm_backward", *arguments)[0])

    check()


def _draw_strided(data, shape, label):
    order = data.draw(st.permutations(range(len(shape))), label=f"order of {label}")
    steps = data.draw(st.tuples(*[st.integers(1, 2)] * len(shape)), label=f"steps of {label}")
    whole = [size * step for size, step in zip(shape, steps, strict=True)]
    values = torch.randn([whole[d] for d in order])
    values = values.permute([order.index(d) for d in range(len(shape))])
    return values[tuple(slice(None, None, step) for step in steps)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_of_any_strides(backend, dtype):
    """Of every second channel, or one value for all: as a sum gives it for a gradient."""
    x, _ = tensors((2, 3, 4, 4), dtype)
    running_mean, running_var, weight, bias, grad_mean = torch.rand(5, 6)[:, ::2]
    grad_var, mean = torch.randn(1).expand(3), torch.randn(6)[::2]
    parameters = (running_mean, running_var, weight, bias)
    y, *_ = run("batch_norm", x, *parameters, EPS, True)
    assert_bits(y, reference("batch_norm", x, *parameters, EPS, True)[0])
    arguments = (torch.randn(1).to(dtype).expand(x.shape), grad_mean, grad_var, x, mean)
    arguments += (*parameters, EPS, True, True)
    results = run("batch_norm_backward", *arguments)
    expected = reference("batch_norm_backward", *arguments)
    assert_bits(results[0], expected[0])
    torch.testing.assert_close(results[1:], expected[1:])


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1e-3, 0.1])
def test_scale_is_rounded_once(backend, eps):
    """From float64, with eps in float64 too: many variances, so that some would round otherwise."""
    running_var = torch.rand(2000 if backend == "compiled" else 100) * 0.01 + 1e-6
    zeros, ones = torch.zeros_like(running_var), torch.ones_like(running_var)
    y, *_ = run("batch_norm", ones[None], zeros, running_var, None, None, eps, False)
    assert_bits(y[0], (running_var.double() + eps).rsqrt().float())


def test_nothing_in_nothing_out(backend):
    x, parameters = tensors((0, 3, 4, 4))
    y, mean, var = batch_norm(x, *parameters)
    assert y.shape == x.shape
    assert mean.isnan().all()
    assert var.isnan().all()
    grads = run("batch_norm_backward", x, mean, var, x, mean, *parameters, EPS, True, True)
    assert [grad.tolist() for grad in grads[1:]] == [[0.0] * 3] * 2
    x, parameters = tensors((2, 0, 4, 4))
    assert [value.numel() for value in batch_norm(x, *parameters)] == [0, 0, 0]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_nan_stays_in_its_channel(backend, layout):
    x, parameters = tensors((2, 5, 6, 6), layout=layout)
    x[1, 2, 3, 4] = torch.nan
    y, mean, var = batch_norm(x, *parameters, EPS, True)
    assert y.isnan().nonzero().tolist() == [[1, 2, 3, 4]]
    assert mean.isnan().nonzero().tolist() == var.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_special_values_are_the_references(backend, layout):
    """Infinities, denormals, zeros of both signs and values where ReLU begins, with NaN among."""
    special = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -1e-45, 3e38, 0.25, 0.5]
    values = torch.tensor(special)
    x = LAYOUTS[layout](values.repeat(4, 3, 1)[..., None].contiguous())
    parameters = (torch.tensor([0.0, 0.25, -1e-40]), torch.ones(3), torch.tensor([1.0, -1.0, 2.0]))
    bias = torch.tensor([0.0, -0.0, 1e-40])
    grad_y = LAYOUTS[layout](values.flip(0).repeat(4, 3, 1)[..., None].contiguous())
    for relu in (True, False):
        y, *_ = run("batch_norm", x, *parameters, bias, EPS, relu)
        assert_bits(y, reference("batch_norm", x, *parameters, bias, EPS, relu)[0])
        arguments = (grad_y, None, None, x, bias, *parameters, bias, EPS, relu, False)
        grad_x, *_ = run("batch_norm_backward", *arguments)
        assert_bits(grad_x, reference("batch_norm_backward", *arguments)[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_bits_do_not_depend_on_threads(backend, layout):
    """Nor do they change from run to run."""
    shape = (16, 32, 30, 30) if backend == "compiled" else (3, 2, 20, 20)
    x, parameters = tensors(shape, layout=layout)
    grad_y = torch.randn(x.shape)

    def once(threads):
        torch.set_num_threads(threads)
        _, mean, var = outputs = batch_norm(x, *parameters, EPS, True)
        arguments = (grad_y, mean, var, x, mean, *parameters, EPS, True, True)
        return [*outputs, *run("batch_norm_backward", *arguments)]

    before = torch.get_num_threads()
    try:
        one = once(1)
        for threads in (2, 3, 2) if backend == "compiled" else (2,):
            torch.testing.assert_close(once(threads), one, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)

"""batch_norm and batch_norm_statistics: every backend against the reference and float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dfq_kernels import batch_norm, batch_norm_statistics
from dfq_kernels._backend import use, variant

EPS = 1e-5
HALF_ULP = 2.0**-24
BACKENDS = [name for name in ("compiled", "triton") if variant("batch_norm", name, "cpu")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "planes 7x7": (4, 40, 7, 7),
    "planes 3x3": (5, 64, 3, 3),
    "planes 70x70": (2, 3, 70, 70),
    "runs of 1031": (3, 2, 1, 1031),
    "features": (1031, 10),
    "130 channels": (9, 130, 6, 6),
    "17 channels": (3, 17, 9, 5),
    "1 channel": (3, 1, 17, 5),
    "5-d": (2, 3, 2, 3, 4),
    "1 element": (1, 1),
    "1 position": (1, 48),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "of more channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend that this install has; variant(op, backend, "cpu") is its function."""
    with use(request.param):
        yield request.param


def _reference(op):
    return variant(op, "reference", "cpu")


def _tensors(shape, dtype=torch.float32, layout="contiguous"):
    """x, and parameters in the order of the op."""
    channels = shape[1]
    x = LAYOUTS[layout]((torch.randn(shape) * 2 + 0.5).to(dtype))
    running_mean, weight, bias = torch.randn(3, channels)
    return x, (running_mean, torch.rand(channels) + 0.1, weight, bias)


def _dims(x):
    return [0, *range(2, x.ndim)]


def _statistics64(x):
    var, mean = torch.var_mean(x.double(), _dims(x), correction=0)
    return mean, var


def _assert_as_good(values, reference, exact, scale=None):
    """The largest error is at most twice that of the reference, or of rounding once.

    What is rounded is the result or ``scale``: of a sum, the sum of the magnitudes of its terms.
    """
    rounding = (exact if scale is None else scale).abs().max() * HALF_ULP
    allowed = 2 * torch.maximum((reference.double() - exact).abs().max(), rounding)
    assert (values.double() - exact).abs().max() <= allowed


def _composite(x, running_mean, running_var, weight, bias, relu):
    var, mean = torch.var_mean(x, _dims(x), correction=0)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, EPS)
    return (y.relu() if relu else y), mean, var


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_forward_is_the_reference(backend, shape, layout, dtype):
    x, parameters = _tensors(shape, dtype, layout)
    for relu, affine in ((True, parameters), (False, (*parameters[:2], None, None))):
        y, mean, var = variant("batch_norm", backend, "cpu")(x, *affine, EPS, relu)
        y_reference, *reference = _reference("batch_norm")(x, *affine, EPS, relu)
        torch.testing.assert_close(y, y_reference, rtol=0, atol=0)
        assert y.stride() == torch.empty_like(x).stride()
        exact_mean, exact_var = _statistics64(x)
        _assert_as_good(mean, reference[0], exact_mean, scale=x.double().abs().mean(_dims(x)))
        _assert_as_good(var, reference[1], exact_var)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backward_is_the_reference(backend, shape, layout, dtype):
    x, parameters = _tensors(shape, dtype, layout)
    mean, var = _reference("batch_norm_statistics")(x, parameters[0])
    grad_y = LAYOUTS[layout](torch.randn(shape).to(dtype))
    arguments = (grad_y, torch.randn_like(mean), torch.randn_like(var), x, mean, *parameters)
    result = variant("batch_norm_backward", backend, "cpu")(*arguments, EPS, True, True)
    reference = _reference("batch_norm_backward")(*arguments, EPS, True, True)
    torch.testing.assert_close(result[0], reference[0], rtol=0, atol=0)
    assert result[0].stride() == torch.empty_like(x).stride()

    column = [1, -1] + [1] * (x.ndim - 2)
    running_mean, running_var, weight, bias = (p.view(column) for p in parameters)
    scale = (running_var.double() + EPS).rsqrt().float() * weight
    passes = (x.float() - running_mean) * scale + bias > 0
    of_bias = torch.where(passes, grad_y, 0).double()
    of_weight = of_bias * (x.double() - running_mean) / (running_var.double() + EPS).sqrt()
    for value, from_reference, terms in zip(
        result[1:], reference[1:], (of_weight, of_bias), strict=True
    ):
        dims = _dims(x)
        _assert_as_good(value, from_reference, terms.sum(dims), scale=terms.abs().sum(dims))


@pytest.mark.parametrize("learns", [True, False], ids=["learns", "frozen"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("given_grads", ["y", "y mean", "y var", "mean var", "mean", "var"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_backward_without_some_gradients(backend, layout, given_grads, relu, learns):
    x, parameters = _tensors((3, 10, 6, 7), layout=layout)
    mean = x.mean(_dims(x))
    grad_mean = torch.randn(10) if "mean" in given_grads else None
    grad_var = torch.randn(10) if "var" in given_grads else None
    if "y" in given_grads:
        op, arguments = "batch_norm_backward", (torch.randn(x.shape), grad_mean, grad_var, x, mean)
        arguments += (*parameters, EPS, relu, learns)
    else:
        op, arguments = "batch_norm_statistics_backward", (grad_mean, grad_var, x, mean)
    result, reference = variant(op, backend, "cpu")(*arguments), _reference(op)(*arguments)
    if isinstance(result, torch.Tensor):
        result, reference = [result], [reference]
    torch.testing.assert_close(result[0], reference[0], rtol=0, atol=0)
    assert all(a.shape == b.shape for a, b in zip(result, reference, strict=True))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_gradients_are_those_of_the_composite(backend, layout, relu, affine):
    x, (running_mean, running_var, weight, bias) = _tensors((8, 12, 9, 5), layout=layout)
    cotangents = (torch.randn(x.shape), torch.randn(12), torch.randn(12))

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
        _assert_as_good(*values)


def test_gradients_of_the_statistics(backend):
    x, (running_mean, *_) = _tensors((8, 12, 9, 5))
    weights = torch.randn(2, 12)

    def gradient(statistics, dtype):
        leaf = x.detach().to(dtype).requires_grad_()
        mean, var = statistics(leaf)
        loss = (weights[0] * (mean - 1) ** 2).sum() + (weights[1] * var).sum()
        return torch.autograd.grad(loss, leaf)[0]

    ours = gradient(lambda leaf: batch_norm_statistics(leaf, running_mean), torch.float32)
    _assert_as_good(
        ours, gradient(_statistics64, torch.float32), gradient(_statistics64, torch.float64)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "every second"])
def test_statistics_are_those_of_batch_norm(backend, layout, dtype):
    x, parameters = _tensors((9, 20, 12, 12), dtype, layout)
    _, *expected = batch_norm(x, *parameters)
    torch.testing.assert_close([*batch_norm_statistics(x, parameters[0])], expected, rtol=0, atol=0)


@pytest.mark.parametrize("guess", [1000.0, 999.5, 0.0, -3000.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_statistics_far_from_zero(backend, layout, guess):
    x = LAYOUTS[layout](torch.randn(16, 24, 40, 40) + 1000)
    exact = _statistics64(x)
    for value, true in zip(batch_norm_statistics(x, torch.full((24,), guess)), exact, strict=True):
        assert ((value - true) / true).abs().max() <= 2e-7


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_rounding_of_equal_values_does_not_add_up(backend, layout, dtype):
    """Many 16-bit values are equal, and so would be what is lost in taking a mean from them."""
    x = LAYOUTS[layout]((torch.randn(1031, 40) * 2 + 0.5).to(dtype))
    exact_mean, _ = _statistics64(x)
    mean, _ = batch_norm_statistics(x, torch.zeros(40))
    assert ((mean - exact_mean) / exact_mean).abs().max() <= 2 * HALF_ULP


def test_statistics_of_a_constant_are_exact(backend):
    x = torch.full((4, 3, 50, 50), 0.1)
    mean, var = batch_norm_statistics(x, torch.zeros(3))
    torch.testing.assert_close(mean, x[0, :, 0, 0], rtol=0, atol=0)
    torch.testing.assert_close(var, torch.zeros(3), rtol=0, atol=0)


def test_nothing_in_nothing_out(backend):
    x, parameters = _tensors((0, 3, 4, 4))
    y, mean, var = batch_norm(x, *parameters)
    assert y.shape == x.shape
    assert mean.isnan().all()
    assert var.isnan().all()
    x, parameters = _tensors((2, 0, 4, 4))
    assert [value.numel() for value in batch_norm(x, *parameters)] == [0, 0, 0]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_nan_stays_in_its_channel(backend, layout):
    x, parameters = _tensors((2, 5, 6, 6), layout=layout)
    x[1, 2, 3, 4] = torch.nan
    y, mean, var = batch_norm(x, *parameters, EPS, True)
    assert y.isnan().nonzero().tolist() == [[1, 2, 3, 4]]
    assert mean.isnan().nonzero().tolist() == var.isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_bits_do_not_depend_on_threads(backend, layout):
    x, parameters = _tensors((16, 32, 30, 30), layout=layout)
    grad_y = torch.randn(x.shape)

    def run(threads):
        torch.set_num_threads(threads)
        _, mean, var = outputs = batch_norm(x, *parameters, EPS, True)
        arguments = (grad_y, mean, var, x, mean, *parameters, EPS, True, True)
        return [*outputs, *torch.ops.dfq.batch_norm_backward(*arguments)]

    before = torch.get_num_threads()
    try:
        one = run(1)
        for threads in (2, 3, 2):
            torch.testing.assert_close(run(threads), one, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_strides(backend, data):
    """x and grad_y each a slice of a permuted tensor, with strides of its own."""
    shape = data.draw(st.lists(st.integers(1, 20), min_size=2, max_size=4), label="shape")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")

    def draw(label):
        order = data.draw(st.permutations(range(len(shape))), label=f"order of {label}")
        steps = data.draw(st.tuples(*[st.integers(1, 2)] * len(shape)), label=f"steps of {label}")
        whole = [size * step for size, step in zip(shape, steps, strict=True)]
        values = torch.randn([whole[d] for d in order]).to(dtype)
        values = values.permute([order.index(d) for d in range(len(shape))])
        return values[tuple(slice(None, None, step) for step in steps)]

    x, grad_y = draw("x"), draw("grad_y")
    _, parameters = _tensors(shape)
    arguments = (x, *parameters, EPS, True)
    y, mean, var = variant("batch_norm", backend, "cpu")(*arguments)
    torch.testing.assert_close(y, _reference("batch_norm")(*arguments)[0], rtol=0, atol=0)
    arguments = (grad_y, mean, var, x, mean, *parameters, EPS, True, False)
    grad_x = variant("batch_norm_backward", backend, "cpu")(*arguments)[0]
    expected = _reference("batch_norm_backward")(*arguments)[0]
    torch.testing.assert_close(grad_x, expected, rtol=0, atol=0)


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
    x, parameters = _tensors((2, 3, 4, 5))
    x.requires_grad_()
    grads = {"y": torch.randn(x.shape), "mean": torch.randn(3), "var": torch.randn(3)}
    used = outputs.split()
    with _Recorder(x.numel()) as recorder:
        results = dict(zip(grads, batch_norm(x, *parameters, EPS, True), strict=True))
        torch.autograd.grad([results[name] for name in used], x, [grads[name] for name in used])
    names = [name for name in recorder.names if name not in ("aten::detach", "aten::view_as")]
    assert names == ["batch_norm", backward]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "every second"])
def test_opcheck(backend, layout, dtype):
    x, (running_mean, running_var, weight, bias) = _tensors((2, 3, 4, 6), dtype, layout)
    x.requires_grad_()
    weight.requires_grad_()
    mean = torch.randn(3)
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
    x, _ = _tensors((2, 3, 8, 8), layout=layout)
    layer = _Layer(3)

    def run(function):
        leaf = x.detach().requires_grad_()
        y, loss = function(leaf)
        inputs = (leaf, layer.norm.weight, layer.norm.bias)
        return [y, *torch.autograd.grad(y.sum() + loss, inputs)]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled), run(layer), rtol=0, atol=0)


def test_exports_as_one_op():
    x, _ = _tensors((2, 3, 8, 8))
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

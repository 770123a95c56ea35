"""What the tests of batch_norm share: shapes and layouts, the reference, and how exact is exact.

Only the compiled backend is fast enough on a CPU for every shape in every layout. The others get
the ``FEW``, which take each of their ways through memory.
"""

import torch
from torch import Tensor

from dfq_kernels._backend import implementation, variant

EPS = 1e-5
HALF_ULP = 2.0**-24
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
FEW = {
    "contiguous": [(2, 2, 8, 6), (17, 3, 3, 3), (3, 2, 1, 261), (33, 10), (1, 12), (1, 1)],
    "channels-last": [(3, 70, 3, 2), (3, 16, 5, 13), (2, 3, 2, 3, 4), (3, 1, 9, 5)],
    "every second": [(2, 2, 4, 5), (40, 6)],
    "transposed": [(2, 2, 4, 8)],
    "of more channels": [(2, 2, 4, 4), (130, 8)],
    "expanded": [(3, 2, 4, 4)],
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "of more channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def shapes(backend, layout):
    """Each with the same random numbers, whatever comes before it."""
    for shape in SHAPES.values() if backend == "compiled" else FEW[layout]:
        torch.manual_seed(0)
        yield shape


def run(op, *args):
    """On the backend that is in force."""
    return implementation(op, "cpu")(*args)


def reference(op, *args):
    return variant(op, "reference", "cpu")(*args)


def tensors(shape, dtype=torch.float32, layout="contiguous"):
    """x, and parameters in the order of the op."""
    channels = shape[1]
    x = LAYOUTS[layout]((torch.randn(shape) * 2 + 0.5).to(dtype))
    running_mean, weight, bias = torch.randn(3, channels)
    return x, (running_mean, torch.rand(channels) + 0.1, weight, bias)


def dims(x):
    return [0, *range(2, x.ndim)]


def statistics64(x):
    var, mean = torch.var_mean(x.double(), dims(x), correction=0)
    return mean, var


def assert_as_good(values, of_reference, exact, scale=None):
    """The largest error is at most twice that of the reference, or of rounding once.

    What is rounded is the result or ``scale``: of a sum, the sum of the magnitudes of its terms.
    """
    rounding = (exact if scale is None else scale).abs().max() * HALF_ULP
    allowed = 2 * torch.maximum((of_reference.double() - exact).abs().max(), rounding)
    assert (values.double() - exact).abs().max() <= allowed


def assert_bits(actual: Tensor, expected: Tensor):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_forward(x, parameters):
    """y is the reference's, and the statistics are as good, with ReLU and without parameters."""
    for relu, affine in ((True, parameters), (False, (*parameters[:2], None, None))):
        y, mean, var = run("batch_norm", x, *affine, EPS, relu)
        y_reference, *statistics = reference("batch_norm", x, *affine, EPS, relu)
        assert_bits(y, y_reference)
        assert y.stride() == torch.empty_like(x).stride()
        exact_mean, exact_var = statistics64(x)
        assert_as_good(mean, statistics[0], exact_mean, scale=x.double().abs().mean(dims(x)))
        assert_as_good(var, statistics[1], exact_var)


def assert_backward(grad_y, x, parameters):
    """grad_x is the reference's, and the gradients of weight and bias are as good."""
    mean, var = reference("batch_norm_statistics", x, parameters[0])
    arguments = (grad_y, torch.randn_like(mean), torch.randn_like(var), x, mean, *parameters)
    result = run("batch_norm_backward", *arguments, EPS, True, True)
    expected = reference("batch_norm_backward", *arguments, EPS, True, True)
    assert_bits(result[0], expected[0])
    assert result[0].stride() == torch.empty_like(x).stride()

    column = [1, -1] + [1] * (x.ndim - 2)
    running_mean, running_var, weight, bias = (p.view(column) for p in parameters)
    scale = (running_var.double() + EPS).rsqrt().float() * weight
    passes = (x.float() - running_mean) * scale + bias > 0
    of_bias = torch.where(passes, grad_y, 0).double()
    of_weight = of_bias * (x.double() - running_mean) / (running_var.double() + EPS).sqrt()
    for value, from_reference, terms in zip(
        result[1:], expected[1:], (of_weight, of_bias), strict=True
    ):
        scale = terms.abs().sum(dims(x))
        assert_as_good(value, from_reference, terms.sum(dims(x)), scale=scale)

"""fake_quantize_all: on every backend the same as fake_quantize for each tensor."""

import pytest
import torch
from torch.autograd import grad

from dfq_kernels import fake_quantize, fake_quantize_all

# shape, per channel, dtype, layout: rows shorter than a vector, one row, no rows, one scale
WEIGHTS = [
    ((16, 3, 3, 3), True, torch.float32, torch.contiguous_format),
    ((8, 16, 3, 3), True, torch.float32, torch.channels_last),
    ((10, 64), True, torch.float32, torch.contiguous_format),
    ((7, 1, 5, 5), False, torch.float32, torch.contiguous_format),
    ((1, 1031), True, torch.bfloat16, torch.contiguous_format),
    ((5, 33), True, torch.float16, torch.contiguous_format),
    ((0, 4), True, torch.float32, torch.contiguous_format),
    ((6,), True, torch.float32, torch.contiguous_format),
]


def _model():
    """The five lists, for WEIGHTS; every other grid is asymmetric."""
    xs, scales, zero_points = [], [], []
    for shape, per_channel, dtype, layout in WEIGHTS:
        channels = shape[0] if per_channel else 1
        xs.append(torch.randn(shape).to(dtype, memory_format=layout).requires_grad_())
        scales.append((torch.rand(channels) * 0.3 + 0.05).requires_grad_())
        zero_points.append((torch.randn(channels) * (len(xs) % 2)).requires_grad_())
    return xs, scales, zero_points, [-8, -2] * 4, [7, 1] * 4


def _one_by_one(xs, scales, zero_points, quant_mins, quant_maxs):
    return [
        fake_quantize(x, scale, *rest, axis=0 if scale.numel() != 1 else None)
        for x, scale, *rest in zip(xs, scales, zero_points, quant_mins, quant_maxs, strict=True)
    ]


def _assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert a.stride() == b.stride()


def test_values_are_those_of_fake_quantize(backend):
    model = _model()
    _assert_same(fake_quantize_all(*model), _one_by_one(*model))


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_gradients_are_those_of_fake_quantize(backend, layout):
    """Also where a gradient lies in memory otherwise than its x."""
    model = _model()
    inputs = [tensor for tensors in model[:3] for tensor in tensors]
    grads = [torch.randn_like(x) for x in model[0]]
    grads = [g.contiguous(memory_format=layout) if g.ndim == 4 else g for g in grads]
    together = grad(fake_quantize_all(*model), inputs, grads)
    apart = grad(_one_by_one(*model), inputs, grads)
    count = len(grads)
    _assert_same(together[:count], apart[:count])
    for a, b in zip(together[count:], apart[count:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)  # sums, cut at other places


def test_only_the_gradients_asked_for(backend):
    xs, scales, *rest = model = _model()
    xs[0].requires_grad_(False)
    scales[1].requires_grad_(False)
    sum(y.float().sum() for y in fake_quantize_all(*model)).backward()
    assert xs[0].grad is None
    assert scales[1].grad is None
    assert all(t.grad is not None for t in (xs[1], scales[0], *rest[0]))


def test_an_unused_output_leaves_its_inputs_at_zero(backend):
    model = _model()
    scales = model[1]
    first, *_ = fake_quantize_all(*model)
    assert first.abs().sum() > 0
    of_first, of_second = grad(first.sum(), [scales[0], scales[1]])
    assert of_first.abs().sum() > 0
    assert not of_second.any()


def test_twice_the_same_bits(backend):
    model = _model()
    inputs = [*model[0], *model[1]]
    grads = [torch.randn_like(x) for x in model[0]]
    once, again = (grad(fake_quantize_all(*model), inputs, grads) for _ in range(2))
    _assert_same(once, again)


def test_nothing_in_nothing_out():
    assert fake_quantize_all([], [], [], [], []) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[0].pop(), r"equally long, got lengths \[7, 8, 8, 8, 8\]"),
        (lambda m: m[0].__setitem__(2, torch.randn(64, 10).T), r"use fake_quantize for this one"),
        (lambda m: m[0].__setitem__(2, torch.tensor(1.0)), r"use fake_quantize for this one"),
        (lambda m: m[1].__setitem__(0, torch.ones(3)), r"scale must be float32 of shape \[16\]"),
        (lambda m: m[3].__setitem__(0, 9), r"quant_min must be below quant_max"),
        (lambda m: m[0].__setitem__(0, m[0][0].double()), r"x must be float32, float16"),
    ],
    ids=["length", "transposed", "0-d", "scale", "bounds", "dtype"],
)
def test_bad_arguments_are_named(change, message):
    model = _model()
    change(model)
    with pytest.raises(ValueError, match=message):
        fake_quantize_all(*model)


@pytest.mark.filterwarnings("ignore")
def test_op_contract():
    xs, scales, zero_points, *bounds = _model()
    torch.library.opcheck(
        torch.ops.dfq.fake_quantize_all.default, (xs, scales, zero_points, *bounds)
    )


def test_compiles_without_a_break():
    xs, scales, zero_points, *bounds = _model()

    def total(xs, scales):
        return sum(y.float().square().sum() for y in fake_quantize_all(xs, scales, *rest))

    rest = (zero_points, *bounds)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    expected = grad(total(xs, scales), scales)
    torch.testing.assert_close(grad(compiled(xs, scales), scales), expected)


def test_second_derivative_is_refused():
    xs, *rest = _model()
    (first,) = grad(fake_quantize_all(xs, *rest)[0].square().sum(), xs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        first.sum().backward()

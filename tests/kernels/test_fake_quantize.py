"""fake_quantize: the compiled ops against the reference, and the reference against its maths."""

import math
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from dfq_kernels import _backend, fake_quantize
from dfq_kernels.fake_quantize import (
    fake_quantize_backward_reference,
    fake_quantize_reference,
    philox,
)

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_IDS = ["fp32", "fp16", "bf16"]
EVERYTHING = (True, True, True)  # all three gradients


def _variant(op):
    function = _backend.variant(op, "compiled", "cpu")
    if function is None:
        pytest.skip("the compiled kernels are not in this install")
    return function


@pytest.fixture
def forward():
    return _variant("fake_quantize")


@pytest.fixture
def backward():
    return _variant("fake_quantize_backward")


def _assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert actual.stride() == expected.stride()


def _assert_parity(forward, backward, grad, args):
    _assert_same(forward(*args), fake_quantize_reference(*args))
    dx, dscale, dzero_point = backward(grad, *args, *EVERYTHING)
    expected = fake_quantize_backward_reference(grad, *args, *EVERYTHING)
    _assert_same(dx, expected[0])
    _, scale, zero_point, quant_min, quant_max, *_ = args
    # each term is at most |grad| times the longest way from zero_point: 4 roundings of their sum
    longest = max(abs(quant_min), abs(quant_max)) + max(zero_point.abs().tolist(), default=0) + 1
    terms = grad.double().abs().sum().item()
    torch.testing.assert_close(dscale, expected[1], rtol=2**-23, atol=2**-22 * terms * longest)
    largest = max(scale[scale.isfinite()].tolist(), default=0)
    torch.testing.assert_close(
        dzero_point, expected[2], rtol=2**-23, atol=2**-22 * terms * largest, equal_nan=True
    )


# Any strides: a base tensor that is stepped through, permuted and expanded.
@st.composite
def tensors(draw, dtype, rng):
    shape = draw(st.lists(st.integers(1, 9), min_size=0, max_size=4))
    if shape and draw(st.booleans()):
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from([0, 17, 33, 70]))
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    base = torch.randn([n * step for n, step in zip(shape, steps, strict=True)], generator=rng)
    x = (base * 2).to(dtype)[tuple(slice(None, None, step) for step in steps)]
    x = x.permute(draw(st.permutations(range(len(shape)))))
    if x.numel() and x.ndim and draw(st.integers(0, 4)) == 0:
        d = draw(st.integers(0, x.ndim - 1))
        x = x.narrow(d, 0, 1).expand(*(5 if i == d else -1 for i in range(x.ndim)))
    return x


@hypothesis.given(data=st.data())
@hypothesis.settings(deadline=None, max_examples=250, derandomize=True)
def test_compiled_equals_reference(data):
    forward, backward = _variant("fake_quantize"), _variant("fake_quantize_backward")
    draw = data.draw
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(DTYPES))
    x = draw(tensors(dtype, rng))
    axis = draw(st.sampled_from([None, *range(x.ndim)]))
    channels = 1 if axis is None else x.shape[axis]
    bits = draw(st.integers(2, 8))
    bounds = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if draw(st.booleans()) else (0, 2**bits - 1)
    scale = torch.rand(channels, generator=rng) + 2**-8
    zero_point = torch.zeros(channels)
    if draw(st.booleans()):
        zero_point = (torch.rand(channels, generator=rng) * 2 - 1) * 2 ** (bits - 1)
    drop = draw(st.sampled_from([0.0, 0.25, 1.0]))
    seed = torch.tensor(draw(st.integers(-(2**63), 2**63 - 1))) if drop else None
    grad = torch.randn(x.shape, generator=rng).to(dtype)
    if draw(st.booleans()):
        grad = torch.empty_like(x).copy_(grad)
    _assert_parity(forward, backward, grad, (x, scale, zero_point, *bounds, axis, drop, seed))


LAYOUTS = {  # name: shape, axis, dimensions from the slowest; every path, the borders of its blocks
    "one": ((1,), None, (0,)),
    "flat, one short of a segment": ((4095,), None, (0,)),
    "flat, one over a segment": ((4097,), None, (0,)),
    "flat, many chunks": ((70_001,), None, (0,)),
    "rows shorter than a vector": ((70, 9), 0, (0, 1)),
    "rows of 7x7 planes": ((4, 6, 7, 7), 1, (0, 1, 2, 3)),
    "rows of several segments": ((3, 9001), 0, (0, 1)),
    "channels_last, 3": ((2, 3, 31, 33), 1, (0, 2, 3, 1)),
    "channels_last, 10": ((2, 10, 9, 9), 1, (0, 2, 3, 1)),
    "channels_last, 64": ((2, 64, 21, 20), 1, (0, 2, 3, 1)),
    "channels_last, 1031": ((2, 1031, 5, 3), 1, (0, 2, 3, 1)),
    "channels_last, 5000": ((3, 5000, 2, 1), 1, (0, 2, 3, 1)),
    "channels between": ((5, 7, 11), 1, (0, 1, 2)),
}


@pytest.mark.parametrize("drop", [0.0, 0.5], ids=["", "drop"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_equals_reference_at_the_borders(layout, dtype, drop, forward, backward):
    shape, axis, order = LAYOUTS[layout]
    x = torch.randn([shape[d] for d in order]).permute(*np.argsort(order).tolist()).to(dtype)
    channels = 1 if axis is None else shape[axis]
    scale, zero_point = torch.rand(channels) + 0.05, torch.randint(-3, 4, (channels,)).float()
    seed = torch.tensor([2**40 + 7]) if drop else None
    args = (x, scale, zero_point, -8, 7, axis, drop, seed)
    _assert_parity(forward, backward, torch.randn_like(x), args)


@pytest.mark.parametrize("axis", [None, 0, 1], ids=["per-tensor", "axis0", "axis1"])
def test_sliced_rows(axis, forward, backward):
    x = torch.randn(6, 50)[:, :37]
    channels = 1 if axis is None else x.shape[axis]
    args = (x, torch.rand(channels) + 0.1, torch.zeros(channels), -4, 3, axis, 0.0, None)
    _assert_parity(forward, backward, torch.randn(6, 37), args)


def test_sliced_and_expanded_scale(forward, backward):
    scale = (torch.rand(10) + 0.1)[::2]
    args = (torch.randn(4, 5, 6), scale, torch.ones(1).expand(5), -4, 3, 1, 0.0, None)
    _assert_parity(forward, backward, torch.randn(4, 5, 6), args)


@pytest.mark.parametrize("grid", [(-8, 7, 0.0), (0, 255, 128.0), (-2, 1, -1.0)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3, 2**-14, 1e-40, math.inf])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=DTYPE_IDS[1:])
def test_every_half_and_bfloat16(dtype, scale, grid, forward, backward):
    """All 65536 bit patterns: NaN, inf, denormals, both zeros."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    quant_min, quant_max, zero_point = grid
    args = (x, torch.tensor([scale]), torch.tensor([zero_point]), quant_min, quant_max)
    if math.isfinite(scale):
        _assert_parity(forward, backward, torch.ones_like(x), (*args, None, 0.0, None))
    else:  # 0 * inf: the same NaN
        _assert_same(forward(*args, None, 0.0, None), fake_quantize_reference(*args, None, 0, None))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e-40, -1e-40, -0.0, 3e38])
@pytest.mark.parametrize("scale", [0.0, 1e-40, 0.3, 3e38, -0.5, math.nan])
def test_strange_values(value, scale, forward, backward):
    x = torch.tensor([value, 1.0] * 20)
    args = (x, torch.tensor([scale]), torch.tensor([1.0]), -8, 7, None, 0.0, None)
    _assert_same(forward(*args), fake_quantize_reference(*args))
    grads = (torch.ones_like(x), *args, True, False, False)
    _assert_same(backward(*grads)[0], fake_quantize_backward_reference(*grads)[0])


@pytest.mark.parametrize("zero_point", [math.nan, math.inf, -math.inf, 2.0**30, 0.5, 1.5, -2.5])
def test_strange_zero_points(zero_point, forward):
    x = torch.linspace(-3, 3, 100)
    args = (x, torch.tensor([0.3]), torch.tensor([zero_point]), -8, 7, None, 0.0, None)
    _assert_same(forward(*args), fake_quantize_reference(*args))


@pytest.mark.parametrize("scale", [1.0, 0.25, 2**-10], ids=str)
def test_ties_go_to_even(scale, forward):
    steps = torch.arange(-130, 130).float()
    x = (steps + 0.5) * scale  # exact: every tie of the grid
    even = torch.where(steps % 2 == 0, steps, steps + 1).clamp(-128, 127)
    args = (torch.tensor([scale]), torch.zeros(1), -128, 127, None, 0.0, None)
    _assert_same(forward(x, *args), even * scale)
    _assert_same(fake_quantize_reference(x, *args), even * scale)


@pytest.mark.parametrize("zero_point", [0.0, 3.0, -7.0])
def test_levels_are_fixed_points(zero_point):
    levels = (torch.arange(-8, 8) - zero_point) * 0.3
    y = fake_quantize(levels, torch.tensor([0.3]), torch.tensor([zero_point]), -8, 7)
    assert torch.equal(y, levels)


def test_zero_has_no_sign(forward):
    x = torch.tensor([-0.1, -0.0, 0.1])
    for zero_point in (0.0, 3.0):
        args = (x, torch.ones(1), torch.tensor([zero_point]), -8, 7, None, 0.0, None)
        assert not forward(*args).signbit().any()
        assert not fake_quantize_reference(*args).signbit().any()


def test_nan_becomes_quant_min_and_inf_the_ends():
    x = torch.tensor([math.nan, math.inf, -math.inf])
    y = fake_quantize(x, torch.tensor([0.5]), torch.tensor([1.0]), -8, 7)
    assert torch.equal(y, torch.tensor([-4.5, 3.0, -4.5]))


def test_agrees_with_pytorch_on_whole_zero_points():
    x = torch.randn(4, 8, 5, 5) * 3
    scale, zero_point = torch.rand(8) + 0.05, torch.randint(-3, 4, (8,)).float()
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 1, -8, 7)
    assert torch.equal(fake_quantize(x, scale, zero_point, -8, 7, axis=1), expected)
    assert torch.equal(fake_quantize(x, scale, zero_point, -8, 7, axis=-3), expected)


def _composite(x, scale, zero_point, quant_min, quant_max):
    """The definition as autograd sees it, with rounding passed straight through."""
    ratio = x / scale
    code = ratio + (ratio.round() - ratio).detach() + zero_point
    return (code.clamp(quant_min, quant_max) - zero_point) * scale


@pytest.mark.parametrize("axis", [None, 0, 1], ids=["per-tensor", "axis0", "axis1"])
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_gradients_are_those_of_the_composite(backend, axis):
    if backend == "compiled":
        _variant("fake_quantize")
    channels = {None: 1, 0: 6, 1: 5}[axis]
    shape = [1, 1, 1] if axis is None else [channels if d == axis else 1 for d in range(3)]
    scale, zero_point = torch.rand(channels) + 0.1, torch.randint(-2, 3, (channels,)).float()
    # away from where float32 and float64 could round or clamp differently
    x = (torch.randint(-14, 15, (6, 5, 50)) + 0.8 * torch.rand(6, 5, 50) - 0.4) * scale.view(shape)
    grad = torch.randn_like(x)
    exact = [t.double().requires_grad_() for t in (x, scale, zero_point)]
    y = _composite(exact[0], exact[1].view(shape), exact[2].view(shape), -8, 7)
    expected = torch.autograd.grad(y, exact, grad.double())
    inputs = [t.requires_grad_() for t in (x, scale, zero_point)]
    with _backend.use(backend):
        actual = torch.autograd.grad(fake_quantize(*inputs, -8, 7, axis=axis), inputs, grad)
    torch.testing.assert_close(actual[0], expected[0].float(), rtol=0, atol=0)
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-4)


def test_sums_are_as_accurate_as_pytorchs(backward):
    """Error against float64, over several draws, at most twice that of ATen."""
    scale, zero_point = torch.tensor([0.11]), torch.tensor([1.0])
    ours = theirs = 0.0
    for _ in range(8):
        x, grad = torch.randn(100_000), torch.randn(100_000)
        args = (grad, x, scale, zero_point, -8, 7)
        exact = [t.double().requires_grad_() for t in (x, scale, zero_point)]
        truth = torch.autograd.grad(_composite(*exact, -8, 7), exact[1], grad.double())[0]
        aten = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward(*args, 1.0)
        ours += (backward(*args, None, 0.0, None, *EVERYTHING)[1] - truth).abs().item()
        theirs += (aten[1] - truth).abs().item()
    assert ours <= 2 * theirs


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str
)
@pytest.mark.parametrize("axis", [None, 1], ids=["per-tensor", "channels_last"])
def test_only_the_needed_gradients(needs, axis, backward):
    x = torch.randn(3, 5, 20, 20).contiguous(memory_format=torch.channels_last)
    channels = 1 if axis is None else 5
    args = (x, torch.rand(channels) + 0.1, torch.zeros(channels), -8, 7, axis, 0.3)
    args = (*args, torch.tensor([5]))
    grad = torch.randn_like(x)
    whole = backward(grad, *args, *EVERYTHING)
    for part, all_, needed in zip(backward(grad, *args, *needs), whole, needs, strict=True):
        assert torch.equal(part, all_) if needed else part.numel() == 0


@pytest.mark.parametrize(
    "layout", [((400_003,), None), ((300, 4001), 0), ((4, 48, 90, 90), 1)], ids=str
)
def test_threads_do_not_change_a_bit(layout, forward, backward):
    shape, axis = layout
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    channels = 1 if axis is None else shape[axis]
    args = (x, torch.rand(channels) + 0.1, torch.zeros(channels), -8, 7, axis, 0.5)
    args, grad = (*args, torch.tensor([9])), torch.randn_like(x)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((forward(*args), *backward(grad, *args, *EVERYTHING)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


BITS_OF_EVERY_PATH = """
import hashlib, torch
from dfq_kernels import _backend
forward, backward = (_backend.variant(op, "compiled", "cpu") for op in
                     ("fake_quantize", "fake_quantize_backward"))
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    x = torch.randn(3, 37, 9, 11, generator=torch.Generator().manual_seed(0)).to(dtype) * 3
    x[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, 1e-7])
    for layout in (torch.contiguous_format, torch.channels_last):
        for axis, drop in ((None, 0.0), (1, 0.0), (0, 0.3), (1, 0.7)):
            n = 1 if axis is None else x.shape[axis]
            args = (x.contiguous(memory_format=layout), torch.linspace(0.1, 0.9, n),
                    torch.linspace(-3, 3, n), -8, 7, axis, drop, torch.tensor([2**40 + 5]))
            for result in (forward(*args), *backward(args[0] * 0.1, *args, True, True, True)):
                digest.update(result.nan_to_num(7).float().numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits(forward):
    """v4, v3 and the baseline of x86-64; elsewhere there is one, and it agrees with itself."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", BITS_OF_EVERY_PATH],
            cwd=ROOT,
            env={**os.environ, "DFQ_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for isa in ("v4", "v3", "v1")
    }
    assert len(digests) == 1


def _dropped(seed, drop, shape):
    """Where a tensor far off the grid is left as it is."""
    x = torch.full(shape, 100.0, requires_grad=True)
    y = fake_quantize(x, torch.ones(1), torch.zeros(1), -8, 7, drop=drop, seed=torch.tensor(seed))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx == 1, y == 100)  # the same mask backward
    assert torch.equal(dx == 0, y == 7)
    return y == 100


def test_drop_follows_philox():
    words = philox(torch.tensor(2**50 + 3), torch.arange(250)).flatten()
    expected = (words.double() / 2**32 < 0.3).view(40, 25)
    assert torch.equal(_dropped(2**50 + 3, 0.3, (40, 25)), expected)


@pytest.mark.parametrize("drop", [0.5, 0.1])
def test_drop_has_its_probability_everywhere(drop):
    """Chi-square over the patterns of eight neighbours, and over positions in a block of 16."""
    dropped = _dropped(1234, drop, (2**18,))
    patterns = (dropped.view(-1, 8).long() * 2 ** torch.arange(8)).sum(1).bincount(minlength=256)
    ones = torch.tensor([i.bit_count() for i in range(256)])
    expected = patterns.sum() * drop**ones * (1 - drop) ** (8 - ones)
    frequent = expected >= 5
    chi2 = ((patterns - expected) ** 2 / expected)[frequent].sum().item()
    freedom = int(frequent.sum())
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)
    columns = dropped.view(-1, 16).double().sum(0)
    spread = (columns - 2**14 * drop) ** 2 / (2**14 * drop * (1 - drop))
    assert abs(spread.sum().item() - 16) < 5 * math.sqrt(32)


def test_another_seed_drops_others():
    first, second = _dropped(1, 0.5, (10_000,)), _dropped(2, 0.5, (10_000,))
    assert 4_600 < (first == second).sum() < 5_400


def test_drop_of_everything_is_the_identity():
    x = torch.randn(1000)
    y = fake_quantize(x, torch.ones(1), torch.zeros(1), -8, 7, drop=1.0, seed=torch.tensor(0))
    assert torch.equal(x, y)


def test_drop_counts_in_memory_order():
    x = torch.full((2, 3, 4, 5), 100.0)
    args, options = (torch.ones(1), torch.zeros(1), -8, 7), {"drop": 0.5, "seed": torch.tensor(7)}
    flat = fake_quantize(x.flatten(), *args, **options)
    last = fake_quantize(x.contiguous(memory_format=torch.channels_last), *args, **options)
    assert torch.equal(last.permute(0, 2, 3, 1).flatten(), flat)


def _op_arguments():
    x = torch.randn(2, 5, 3, 3)
    last = x.contiguous(memory_format=torch.channels_last)
    per_channel = (torch.rand(5) + 0.1, torch.randint(-2, 2, (5,)).float(), -8, 7, 1, 0.0, None)
    per_tensor = (torch.tensor([0.1]), torch.zeros(1), 0, 15, None, 0.5, torch.tensor([3]))
    return {
        "per-channel": (x.clone().requires_grad_(), *per_channel),
        "channels_last": (last, *per_channel),
        "sliced bf16": (x[:, :, ::2, 1:].bfloat16(), *per_tensor),
    }


@pytest.mark.parametrize("case", ["per-channel", "channels_last", "sliced bf16"])
def test_opcheck(case):
    args = _op_arguments()[case]
    torch.library.opcheck(torch.ops.dfq.fake_quantize.default, args)
    grad = torch.randn(args[0].shape).to(args[0].dtype)
    inputs = (grad, args[0].detach(), *args[1:])
    for needs in (EVERYTHING, (False, True, False)):
        torch.library.opcheck(torch.ops.dfq.fake_quantize_backward.default, (*inputs, *needs))


class _Quantizer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([0.1, 0.2]))
        self.register_buffer("zero_point", torch.zeros(2))

    def forward(self, x):
        return fake_quantize(torch.relu(x), self.scale, self.zero_point, 0, 15, axis=1) * 2


def test_compile_in_one_graph():
    module, x = _Quantizer(), torch.randn(3, 2, 4, requires_grad=True)
    inputs = (x, module.scale)
    eager = module(x)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(eager, compiled)
    ours = torch.autograd.grad(compiled.sum(), inputs)
    for a, b in zip(torch.autograd.grad(eager.sum(), inputs), ours, strict=True):
        assert torch.equal(a, b)


def test_export_holds_the_op():
    module, x = _Quantizer(), torch.randn(3, 2, 4)
    exported = torch.export.export(module, (x,))
    assert torch.ops.dfq.fake_quantize.default in {node.target for node in exported.graph.nodes}
    assert torch.equal(exported.module()(x), module(x))


def test_differentiating_twice_is_refused():
    x = torch.randn(4, requires_grad=True)
    scale = torch.ones(1, requires_grad=True)
    y = fake_quantize(x, scale, torch.zeros(1), -8, 7)
    (dscale,) = torch.autograd.grad(y.sum(), scale, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(dscale, x)


X, ONE, ZERO, SEED = torch.ones(4, 3), torch.ones(1), torch.zeros(1), torch.tensor([1])
MISTAKES = {
    "dtype": ((X.double(), ONE, ZERO, -8, 7), {}, "got torch.float64"),
    "axis": ((X, ONE, ZERO, -8, 7), {"axis": 2}, "has 2, got 2"),
    "scale shape": ((X, torch.ones(4, 1), ZERO, -8, 7), {"axis": 0}, r"got .* \[4, 1\]"),
    "scale dtype": ((X, ONE.double(), ZERO, -8, 7), {}, r"scale must be float32 of shape \[1\]"),
    "zero_point": ((X, torch.ones(4), ZERO, -8, 7), {"axis": 0}, r"zero_point must .* \[4\]"),
    "bounds": ((X, ONE, ZERO, 7, 7), {}, "got 7 and 7"),
    "wide bounds": ((X, ONE, ZERO, 0, 2**21), {}, "2097152"),
    "drop": ((X, ONE, ZERO, -8, 7), {"drop": 1.5, "seed": SEED}, "from 0 to 1, got 1.5"),
    "no seed": ((X, ONE, ZERO, -8, 7), {"drop": 0.5}, "got none"),
    "seed": ((X, ONE, ZERO, -8, 7), {"drop": 0.5, "seed": ONE}, "got torch.float32"),
    "seed elsewhere": ((X, ONE, ZERO, -8, 7), {"drop": 0.5, "seed": SEED.to("meta")}, "on meta"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    args, options, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        fake_quantize(*args, **options)


def test_the_compiled_op_refuses_what_it_would_misread(forward, backward):
    """Whoever calls torch.ops.dfq directly passes no check in Python."""
    rest = (-8, 7, 0, 0.0, None)
    with pytest.raises(RuntimeError, match="Float"):
        forward(X, torch.ones(4).double(), torch.zeros(4), *rest)
    with pytest.raises(RuntimeError, match="expected 4 scales and zero points, got 1 and 4"):
        forward(X, ONE, torch.zeros(4), *rest)
    with pytest.raises(RuntimeError, match="gradient's dtype and shape"):
        backward(X.half(), X, torch.ones(4), torch.zeros(4), *rest, *EVERYTHING)
    with pytest.raises(RuntimeError, match="expected float32, float16 or bfloat16"):
        forward(X.double(), torch.ones(4), torch.zeros(4), *rest)

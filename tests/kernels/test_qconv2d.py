"""qconv2d: every backend against the reference, and the reference against plain integers."""

import os

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from conftest import BACKENDS
from hypothesis import strategies as st
from integer_cases import (
    X_ZEROS,
    assert_same,
    epilogues,
    int8,
    need_backend,
    need_compiled,
    output_of,
    weights,
)

from dfq_kernels import _backend
from dfq_kernels.integer import Epilogue, Int8Grid, Residual, integer_weight, prepack
from dfq_kernels.qconv2d import Window, qconv2d

EXAMPLES = {"compiled": 120, "triton": 8, "cuda": 25}


def images(shape, rng=None, low=-128, high=127):
    return int8(shape, rng, low, high).contiguous(memory_format=torch.channels_last)


def _both(x, weight, epilogue, window, x_zero):
    """The backend in force and the reference."""
    with _backend.use("reference"):
        expected = qconv2d(x, weight, epilogue, window, x_zero=x_zero)
    assert_same(qconv2d(x, weight, epilogue, window, x_zero=x_zero), expected)
    ready = prepack(weight, groups=window.groups, dilation=window.dilation[1])
    if ready.prepacked is not None:
        assert_same(qconv2d(x, ready, epilogue, window, x_zero=x_zero), expected)


@st.composite
def channels(draw, kind):
    """groups, input and output channels of a group."""
    if kind == "depthwise":
        return draw(st.sampled_from([2, 3, 16, 17, 40])), 1, 1
    groups = draw(st.sampled_from([2, 3, 5])) if kind == "grouped" else 1
    return (
        groups,
        draw(st.sampled_from([1, 2, 3, 4, 5, 16, 19])),
        draw(st.sampled_from([1, 2, 15, 16, 17, 32, 33])),
    )


@pytest.mark.parametrize("kind", ["dense", "grouped", "depthwise"])
def test_equals_reference(kind, backend):
    need_backend("qconv2d")

    @hypothesis.given(data=st.data())
    @hypothesis.settings(deadline=None, max_examples=EXAMPLES[backend], derandomize=True)
    def check(data):
        draw = data.draw
        rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        groups, inputs, outputs = draw(channels(kind))
        pairs = [
            st.tuples(st.integers(low, high), st.integers(low, high))
            for low, high in ((1, 5), (1, 3), (0, 4), (1, 3), (1, 20))
        ]
        kernel, stride, padding, dilation, size = (draw(pair) for pair in pairs)
        window = Window(stride, padding, dilation, groups)
        output_size = window.output_size(size, kernel)
        hypothesis.assume(min(output_size) > 0)
        batch = draw(st.sampled_from([0, 1, 1, 2, 5]))
        weight = draw(weights(rng, (groups * outputs, *kernel, inputs)))
        epilogue = draw(epilogues(rng, weight, (batch, groups * outputs, *output_size)))
        x = images((batch, groups * inputs, *size), rng)
        _both(x, weight, epilogue, window, draw(st.sampled_from(X_ZEROS)))

    check()


LAYERS = {  # x, weights, window: whole and part units, tiles, panels and blocks
    "stem": ((2, 3, 40, 40), (64, 7, 7, 3), Window((2, 2), (3, 3))),
    "3x3": ((3, 64, 14, 14), (48, 3, 3, 64), Window(padding=(1, 1))),
    "rows in several units": ((1, 96, 50, 60), (16, 3, 3, 96), Window(padding=(1, 1))),
    "images in one unit": ((9, 32, 7, 7), (32, 3, 3, 32), Window(padding=(1, 1))),
    "images in two units": ((9, 51, 19, 9), (6, 2, 1, 17), Window((1, 3), (5, 3), (1, 3), 3)),
    "1x1": ((2, 64, 9, 9), (100, 1, 1, 64), Window()),
    "1x1, stride 2": ((2, 33, 9, 8), (32, 1, 1, 33), Window((2, 2))),
    "1x1, padded": ((1, 8, 5, 5), (16, 1, 1, 8), Window((2, 3), (2, 1))),
    "wider than the image": ((1, 8, 3, 3), (16, 5, 5, 8), Window(padding=(4, 4))),
    "dilated": ((1, 16, 20, 20), (16, 3, 3, 16), Window(padding=(2, 4), dilation=(2, 4))),
    "grouped": ((2, 64, 8, 8), (128, 3, 3, 16), Window(padding=(1, 1), groups=4)),
    "two outputs a group": ((2, 8, 8, 8), (16, 3, 3, 1), Window(padding=(1, 1), groups=8)),
    "depthwise": ((2, 48, 15, 15), (48, 3, 3, 1), Window(padding=(1, 1), groups=48)),
    "depthwise 5x5/2": ((1, 20, 15, 15), (20, 5, 5, 1), Window((2, 2), (2, 2), groups=20)),
}


WEIGHTS = {
    "w8": (False, False),
    "w4": (True, False),
    "w8 zeros": (False, True),
    "w4 zeros": (True, True),
}
LAYERS_ON_BACKENDS = [
    (backend, layer, kind)
    for backend in BACKENDS
    for i, layer in enumerate(LAYERS)
    if backend == "compiled" or layer != "rows in several units"  # of the CPU
    for kind in (WEIGHTS if backend == "compiled" else list(WEIGHTS)[i % 4 : i % 4 + 1])
]


@pytest.mark.parametrize(
    ("backend", "layer", "kind"), LAYERS_ON_BACKENDS, indirect=["backend"], ids=str
)
def test_layers_of_networks(layer, kind, backend):
    need_backend("qconv2d")
    four_bits, zeros = WEIGHTS[kind]
    x_shape, weight_shape, window = LAYERS[layer]
    half = 8 if four_bits else 128
    zero = int8(weight_shape[:1], None, -half, half - 1) if zeros else None
    weight = integer_weight(int8(weight_shape, None, -half, half - 1), zero, four_bits=four_bits)
    size = window.output_size(x_shape[2:], weight_shape[1:3])
    residual = Residual(images((x_shape[0], weight_shape[0], *size)), 0.3, -5)
    multiplier = torch.rand(weight_shape[0]) / half / torch.Size(weight_shape[1:]).numel() ** 0.5
    epilogue = Epilogue(multiplier, torch.randn(weight_shape[0]), residual, True, Int8Grid(-128))
    _both(images(x_shape), weight, epilogue, window, 3)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("layer", ["3x3", "1x1", "images in two units", "depthwise"])
def test_threads_do_not_change_a_bit(layer, threads):
    need_compiled("qconv2d")
    x_shape, weight_shape, window = LAYERS[layer]
    weight = integer_weight(int8(weight_shape, None))
    epilogue = Epilogue(torch.rand(weight_shape[0]))
    try:
        torch.set_num_threads(threads)
        with _backend.use("compiled"):
            _both(images(x_shape), weight, epilogue, window, 0)
    finally:
        torch.set_num_threads(1)


def _sums(x, weight, window, x_zero):
    """The definition in Python's integers, tap by tap."""
    w = weight.integers()
    groups, (out, height, width, inputs) = window.groups, weight.shape
    rows, columns = window.output_size(tuple(x.shape[2:]), (height, width))
    centered = (x.long() - x_zero).numpy()
    sums = torch.zeros(x.shape[0], out, rows, columns, dtype=torch.int64)
    for b, o, i, j in torch.cartesian_prod(*map(torch.arange, sums.shape)).tolist():
        for r in range(height):
            for s in range(width):
                at = (
                    i * window.stride[0] + r * window.dilation[0] - window.padding[0],
                    j * window.stride[1] + s * window.dilation[1] - window.padding[1],
                )
                if 0 <= at[0] < x.shape[2] and 0 <= at[1] < x.shape[3]:
                    first = o // (out // groups) * inputs
                    for c in range(inputs):
                        value = int(centered[b, first + c, at[0], at[1]])
                        sums[b, o, i, j] += value * int(w[o, r, s, c])
    return sums


@pytest.mark.parametrize(
    "window",
    [Window(), Window((2, 1), (1, 2)), Window((1, 2), (2, 0), (2, 1), 2)],
    ids=["plain", "strided", "all"],
)
def test_reference_is_the_definition(window):
    x = images((2, 4, 5, 6))
    zero = torch.tensor([0, 5, -128, 127], dtype=torch.int8)
    weight = integer_weight(int8((4, 3, 2, 4 // window.groups), None), zero)
    with _backend.use("reference"):
        sums = qconv2d(x, weight, Epilogue(torch.ones(4)), window, x_zero=-7)
    assert torch.equal(sums.long(), _sums(x, weight, window, -7))


def test_epilogue_is_the_definition():
    """Every term, in float32, each operation rounded once."""
    x, weight = images((1, 3, 6, 7)), integer_weight(int8((5, 1, 1, 3), None))
    multiplier, bias = torch.rand(5) / 50, torch.randn(5)
    residual, grid = Residual(images((1, 5, 6, 7)), 0.37, 4), Int8Grid(-3, -100, 90)
    sums = F.conv2d(x.double(), weight.values.permute(0, 3, 1, 2).double()).float()
    f = sums * multiplier.view(-1, 1, 1) + bias.view(-1, 1, 1)
    f = (f + (residual.values.float() - 4) * torch.tensor(0.37)).clamp(min=0)
    expected = (f.round() - 3).clamp(-100, 90)
    y = qconv2d(x, weight, Epilogue(multiplier, bias, residual, True, grid))
    assert y.dtype == torch.int8
    assert torch.equal(y.float(), expected)
    assert y.float().unique().numel() > 20
    plain = qconv2d(x, weight, Epilogue(multiplier, bias, residual))
    expected = sums * multiplier.view(-1, 1, 1) + bias.view(-1, 1, 1)
    assert torch.equal(plain, expected + (residual.values.float() - 4) * torch.tensor(0.37))


def test_ties_go_to_even():
    x, weight = images((1, 1, 16, 16)), integer_weight(torch.ones(1, 1, 1, 1, dtype=torch.int8))
    y = qconv2d(x, weight, Epilogue(torch.tensor([0.5]), grid=Int8Grid(1)))
    assert torch.equal(y, (torch.round(x * 0.5) + 1).to(torch.int8))


def test_padding_is_real_zero():
    """Beyond the border a window sees x_zero: it adds nothing, whatever the weights."""
    x = images((1, 2, 4, 4), low=9, high=9)
    for zero in (None, torch.tensor([5, -7], dtype=torch.int8)):
        weight = integer_weight(int8((2, 3, 3, 2), None), zero)
        y = qconv2d(x, weight, Epilogue(torch.ones(2)), Window(padding=(3, 3)), x_zero=9)
        assert torch.equal(y, torch.zeros(1, 2, 8, 8))


EVERY_PATH = """
import torch
from dfq_kernels import _backend
from dfq_kernels.integer import *
from dfq_kernels.qconv2d import Window, qconv2d
rng = torch.Generator().manual_seed(0)
def int8(*shape, low=-128, high=127):
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=rng)
for groups, inputs, outputs in ((1, 5, 37), (1, 64, 32), (3, 4, 17), (35, 1, 1)):
    for size in ((9, 11), (1, 3)):
        for four_bits in (False, True):
            shape = (groups * outputs, 3, 3, inputs)
            x = int8(2, groups * inputs, *size).contiguous(memory_format=torch.channels_last)
            added = int8(2, shape[0], *size).contiguous(memory_format=torch.channels_last)
            values = int8(*shape, low=-8, high=7)
            weight = integer_weight(values, int8(shape[0]), four_bits=four_bits)
            for grid in (None, Int8Grid(-4)):
                epilogue = Epilogue(torch.rand(shape[0], generator=rng) / 40, None,
                                    Residual(added, 0.7, 3), False, grid)
                args = (x, weight, epilogue, Window(padding=(1, 1), groups=groups))
                with _backend.use("reference"):
                    expected = qconv2d(*args, x_zero=-9)
                assert torch.equal(qconv2d(*args, x_zero=-9), expected)
print("equal")
"""


@pytest.mark.parametrize("isa", ["best", "v4", "v3", "v1"])
def test_every_instruction_set(isa):
    need_compiled("qconv2d")
    environment = {name: value for name, value in os.environ.items() if name != "DFQ_ISA"}
    if isa != "best":
        environment["DFQ_ISA"] = isa
    assert output_of(EVERY_PATH, environment) == "equal\n"


def _op_arguments(groups, grid):
    weight = prepack(integer_weight(int8((6, 3, 3, 6 // groups), None)), groups=groups)
    geometry = ([3, 3], [2, 1], [1, 1], [1, 1], groups)
    values = (weight.values, None, weight.prepacked, 3, *geometry)
    epilogue = (torch.rand(6), torch.rand(6), images((2, 6, 3, 4)), 0.5, 1, True, grid)
    return (images((2, 6, 5, 4)), *values, *epilogue)


@pytest.mark.parametrize("grid", [[], [0, -8, 7]], ids=["float", "int8"])
@pytest.mark.parametrize("groups", [1, 6])
def test_opcheck(groups, grid):
    torch.library.opcheck(torch.ops.dfq.qconv2d.default, _op_arguments(groups, grid))


class _Chain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", int8((4, 3, 3, 4), None, -8, 7))
        self.register_buffer("multiplier", torch.rand(4) / 100)

    def forward(self, x):
        weight, window = integer_weight(self.weight), Window(padding=(1, 1))
        y = qconv2d(x, weight, Epilogue(self.multiplier, relu=True, grid=Int8Grid()), window)
        return qconv2d(y, weight, Epilogue(self.multiplier, residual=Residual(x, 0.5)), window)


def test_compile_in_one_graph_and_export():
    module, x = _Chain(), images((2, 4, 6, 6))
    expected = module(x)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    exported = torch.export.export(module, (x,))
    assert torch.ops.dfq.qconv2d.default in {node.target for node in exported.graph.nodes}
    assert_same(exported.module()(x), expected)


X = images((1, 4, 5, 5))
WEIGHT = integer_weight(torch.ones(2, 3, 3, 4, dtype=torch.int8))
ONES = Epilogue(torch.ones(2))
MISTAKES = {
    "float x": ((X.float(), WEIGHT, ONES), "x must be int8, or .* got torch.float32"),
    "layout": ((X.contiguous(), WEIGHT, ONES), "x must be in channels_last memory"),
    "channels": ((X[:, :3], WEIGHT, ONES), "channels_last memory"),
    "groups": ((X, WEIGHT, ONES, Window(groups=2)), "groups=2 do not fit x of 4"),
    "multiplier": (
        (X, WEIGHT, Epilogue(torch.ones(3))),
        r"multiplier must be .* \[2\], got .* \[3\]",
    ),
    "window": ((X, WEIGHT, ONES, Window(dilation=(3, 1))), "does not fit into"),
    "stride": ((X, WEIGHT, ONES, Window(stride=(0, 1))), "must be positive"),
    "residual": (
        (X, WEIGHT, Epilogue(torch.ones(2), residual=Residual(X, 1.0))),
        r"\[1, 2, 3, 3\]",
    ),
    "grid": ((X, WEIGHT, Epilogue(torch.ones(2), grid=Int8Grid(0, 3, 2))), "got 3 to 2"),
    "gradient": ((X, WEIGHT, Epilogue(torch.ones(2).requires_grad_())), "no gradient"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    args, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        qconv2d(*args)


def test_x_zero_must_be_an_int8():
    with pytest.raises(ValueError, match="x_zero must be an int8, got 128"):
        qconv2d(X, WEIGHT, ONES, x_zero=128)


def test_the_compiled_op_refuses_the_weights_of_another_layer():
    need_compiled("qconv2d")
    other = prepack(integer_weight(torch.ones(2, 3, 3, 8, dtype=torch.int8)))
    args = (X, WEIGHT.values, None, other.prepacked, 0, [3, 3], [1, 1], [0, 0], [1, 1], 1)
    with pytest.raises(RuntimeError, match="not those of this layer"):
        torch.ops.dfq_C.qconv2d(*args, *ONES.arguments())

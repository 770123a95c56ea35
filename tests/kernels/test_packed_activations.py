"""Two 4-bit activations a byte, in and out of qconv2d and qlinear: the bits of the int8 ops."""

import dataclasses
import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from integer_cases import assert_same, int8, need_backend, need_compiled, output_of, weights

from dfq_kernels import _backend
from dfq_kernels.integer import Epilogue, Int8Grid, Residual, integer_weight, prepack
from dfq_kernels.packing import pack_channels, unpack_channels
from dfq_kernels.qconv2d import Window, qconv2d
from dfq_kernels.qlinear import qlinear
from dfq_kernels.requantize import requantize

PACKING = {"compiled": 60, "triton": 5, "cuda": 15}  # of the fixture `backend`: examples
LAST = torch.channels_last


def codes(shape, rng=None):
    """Of four bits: images in channels_last memory, or rows."""
    values = int8(shape, rng, -8, 7)
    return values.contiguous(memory_format=LAST) if len(shape) == 4 else values


def in_bytes(epilogue, axis):
    """The same epilogue without anything packed."""
    residual, grid = epilogue.residual, epilogue.grid
    if residual is not None:
        values = unpack_channels(residual.values, axis)
        residual = dataclasses.replace(residual, values=values)
    if grid is not None:
        grid = dataclasses.replace(grid, packed=False)
    return dataclasses.replace(epilogue, residual=residual, grid=grid)


def agrees(op, x, weight, epilogue, axis, dilation=1, **options):
    """What ``op`` makes of packed and int8 ``x`` is what the reference makes of it in bytes."""
    ready = prepack(weight, dilation=dilation)
    with _backend.use("reference"):
        expected = op(x, weight, in_bytes(epilogue, axis), **options)
    if epilogue.grid is not None and epilogue.grid.packed:
        expected = pack_channels(expected, axis)
    inputs = [x, pack_channels(x, axis)] if x.shape[axis] % 64 == 0 else [x]
    for each in inputs:
        with _backend.use("reference"):
            assert_same(op(each, weight, epilogue, **options), expected)
        assert_same(op(each, weight, epilogue, **options), expected)
        if ready.prepacked is not None:
            assert_same(op(each, ready, epilogue, **options), expected)


@st.composite
def packed_epilogues(draw, rng, weight, shape, axis):
    """For an output of ``shape``; what can be packed is, or not."""
    size = torch.Size(weight.shape[1:]).numel()
    multiplier = torch.rand(weight.shape[0], generator=rng) * 2 / (30 * size**0.5)
    can = shape[axis] % 64 == 0
    residual = None
    if draw(st.booleans()):
        values = codes(shape, rng)
        values = pack_channels(values, axis) if can and draw(st.booleans()) else values
        residual = Residual(values, draw(st.floats(-2, 2)), draw(st.sampled_from([-8, 0, 7])))
    grids = [Int8Grid(0, -8, 7, can), Int8Grid(-8, -8, 7, can), Int8Grid(3, -5, 6, can), None]
    bias = torch.randn(weight.shape[0], generator=rng) if draw(st.booleans()) else None
    return Epilogue(multiplier, bias, residual, draw(st.booleans()), draw(st.sampled_from(grids)))


@pytest.mark.parametrize("backend", PACKING, indirect=True)
def test_convolutions(backend):
    need_backend("qconv2d")

    @hypothesis.given(data=st.data())
    @hypothesis.settings(deadline=None, max_examples=PACKING[backend], derandomize=True)
    def check(data):
        draw = data.draw
        rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        shapes = [(64, 64), (128, 17), (64, 128), (19, 64), (192, 64)]
        inputs, outputs = draw(st.sampled_from(shapes))
        kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
        pairs = [st.tuples(st.integers(a, 2), st.integers(a, 2)) for a in (1, 0, 1)]
        window = Window(*map(draw, pairs))
        size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
        output_size = window.output_size(size, kernel)
        hypothesis.assume(min(output_size) > 0)
        batch = draw(st.sampled_from([0, 1, 3]))
        weight = draw(weights(rng, (outputs, *kernel, inputs)))
        epilogue = draw(packed_epilogues(rng, weight, (batch, outputs, *output_size), 1))
        x = codes((batch, inputs, *size), rng)
        rest = {"window": window, "x_zero": draw(st.sampled_from([-8, 0, 7]))}
        agrees(qconv2d, x, weight, epilogue, 1, window.dilation[1], **rest)

    check()


@pytest.mark.parametrize("backend", PACKING, indirect=True)
@pytest.mark.parametrize("lead", [(0,), (1,), (5,), (2, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (128, 10), (64, 192), (70, 64)])
def test_linear_layers(backend, lead, inputs, outputs):
    need_backend("qlinear")
    rng = torch.Generator().manual_seed(inputs + outputs + len(lead))
    weight = integer_weight(int8((outputs, inputs), rng, -8, 7), four_bits=True)
    multiplier, can = torch.rand(outputs, generator=rng) / 60, outputs % 64 == 0
    added = int8((*lead, outputs), rng, -8, 7)
    added = pack_channels(added, -1) if can else added
    for grid in (Int8Grid(-1, -8, 7, can), None):
        epilogue = Epilogue(multiplier, None, Residual(added, 0.6, -2), grid is None, grid)
        agrees(qlinear, int8((*lead, inputs), rng, -8, 7), weight, epilogue, -1, x_zero=5)


def test_the_reference_reads_the_layout_of_pack_int4():
    """Channel j and j + 32 of each 64 share byte j, the first in its lower four bits."""
    x = codes((2, 128, 3, 2))
    packed = pack_channels(x)
    assert packed.shape == (2, 64, 3, 2)
    assert packed.is_contiguous(memory_format=LAST)
    for channel in (0, 31, 32, 63, 64, 127):
        byte = packed[:, channel // 64 * 32 + channel % 32].int()
        nibble = byte >> 4 if channel % 64 >= 32 else byte & 15
        assert torch.equal((nibble + 8) % 16 - 8, x[:, channel].int())
    assert_same(unpack_channels(packed), x)


EVERY_BLOCK = """
import torch
from dfq_kernels.integer import *
from dfq_kernels.packing import pack_channels, unpack_channels
from dfq_kernels.qconv2d import qconv2d
values = torch.arange(-8, 8, dtype=torch.int8)
x = torch.stack((values.repeat_interleave(16), values.repeat(16)), 1).repeat(1, 32)
x = x.repeat(9, 1)[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
x = x[:, :, None, None].contiguous(memory_format=torch.channels_last)
weight = integer_weight(torch.eye(64, dtype=torch.int8).view(64, 1, 1, 64))
y = qconv2d(pack_channels(x), weight, Epilogue(torch.ones(64), grid=Int8Grid(0, -8, 7, True)))
assert y.dtype == torch.uint8
assert torch.equal(unpack_channels(y), x)
print("equal")
"""


@pytest.mark.parametrize("isa", ["v3", "v1"])
def test_every_byte_by_other_instruction_sets(isa):
    need_compiled("qconv2d")
    assert output_of(EVERY_BLOCK, os.environ | {"DFQ_ISA": isa}) == "equal\n"


def test_opcheck():
    weight = prepack(integer_weight(int8((64, 1, 1, 64), None, -8, 7), four_bits=True))
    values = (weight.values, None, weight.prepacked, 3)
    x = pack_channels(codes((2, 64, 3, 4)))
    rest = (torch.rand(64), None, x, 0.5, 1, True, [0, -8, 7, 1])
    conv = (x, *values, [1, 1], [1, 1], [0, 0], [1, 1], 1, *rest)
    torch.library.opcheck(torch.ops.dfq.qconv2d.default, conv)
    weight = prepack(integer_weight(int8((64, 64), None)))
    x = pack_channels(codes((5, 64)))
    values = (weight.values, None, weight.prepacked, 3)
    rest = (torch.rand(64), None, x, 0.5, 1, True, [0, -8, 7, 1])
    torch.library.opcheck(torch.ops.dfq.qlinear.default, (x, *values, *rest))


def _weight(*shape):
    return integer_weight(torch.ones(shape, dtype=torch.int8))


X = pack_channels(codes((1, 64, 2, 2)))
ONES, GRID = Epilogue(torch.ones(64)), Int8Grid(0, -8, 7, True)
SOME = _weight(64, 1, 1, 64)
MISTAKES = {
    "channels": (lambda: qconv2d(X[:, :24].contiguous(memory_format=LAST), SOME, ONES), "got 48"),
    "groups": (
        lambda: qconv2d(X, _weight(64, 1, 1, 32), ONES, Window(groups=2)),
        "x may be packed only with a multiple of 64 channels and groups=1, got 64 .* groups=2",
    ),
    "zero": (lambda: qconv2d(X, SOME, ONES, x_zero=8), "x_zero must be -8 to 7 .* got 8"),
    "rows": (lambda: qlinear(X[0, :, 0, :1].T, _weight(64, 32), ONES), r"got \[1, 32\] and"),
    "row of 80": (lambda: qlinear(torch.zeros(1, 40).byte(), _weight(64, 80), ONES), "got 80"),
    "output": (
        lambda: qconv2d(X, _weight(40, 1, 1, 64), Epilogue(torch.ones(40), grid=GRID)),
        "the output may be packed .* got 40 channels",
    ),
    "output of groups": (
        lambda: qconv2d(
            codes((1, 64, 2, 2)),
            _weight(64, 1, 1, 1),
            Epilogue(torch.ones(64), grid=GRID),
            Window(groups=64),
        ),
        "the output may be packed .* groups=64",
    ),
    "low": (
        lambda: qconv2d(X, SOME, Epilogue(torch.ones(64), grid=Int8Grid(0, -9, 7, True))),
        "low of the output's grid must be -8 to 7 where values are packed, got -9",
    ),
    "residual": (
        lambda: qconv2d(X, SOME, Epilogue(torch.ones(64), residual=Residual(X[..., :1], 1.0))),
        r"or packed as such an output is, got torch.uint8 of shape \[1, 32, 2, 1\]",
    ),
    "zero of the residual": (
        lambda: qconv2d(X, SOME, Epilogue(torch.ones(64), residual=Residual(X, 1.0, 9))),
        "the zero of the residual must be -8 to 7",
    ),
    "requantize": (
        lambda: requantize(codes((1, 64, 1, 1)), (1.0, 1.0), 0, GRID),
        "requantize writes int8 only",
    ),
    "packing": (lambda: pack_channels(codes((1, 70, 1, 1))), "multiple of 64 .* got 70"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    call, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        call()

"""Random integer layers for the tests of qconv2d and qlinear."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from dfq_kernels import _backend
from dfq_kernels.integer import Epilogue, Int8Grid, Residual, integer_weight

ROOT = Path(__file__).parents[2]
X_ZEROS = [0, -128, 127, 7]
GRIDS = [None, Int8Grid(), Int8Grid(-3, -8, 7), Int8Grid(-128), Int8Grid(0, 0, 15)]


def int8(shape, rng, low=-128, high=127):
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=rng)


def need_backend(op):
    """Skips the test if the backend in force, of the fixture ``backend``, lacks ``op``."""
    try:
        _backend.implementation(op, "cpu")
    except RuntimeError as error:
        pytest.skip(str(error))


def need_compiled(op):
    if _backend.variant(op, "compiled", "cpu") is None:
        pytest.skip("the compiled kernels are not in this install")


@st.composite
def weights(draw, rng, shape):
    """Of 2 to 8 bits, packed if they may be, with zeros or without."""
    bits = draw(st.integers(2, 8))
    half = 2 ** (bits - 1)
    zero = int8(shape[:1], rng, -half, half - 1) if draw(st.booleans()) else None
    four_bits = bits <= 4 and draw(st.booleans())
    return integer_weight(int8(shape, rng, -half, half - 1), zero, four_bits=four_bits)


@st.composite
def epilogues(draw, rng, weight, shape):
    """For an output [B, O, ...] whose values lie on the grid and beyond both ends."""
    size = torch.Size(weight.shape[1:]).numel()
    largest = max(1, weight.integers().abs().max().item())
    multiplier = torch.rand(shape[1], generator=rng) * 40 / (60 * largest * size**0.5)
    bias = torch.randn(shape[1], generator=rng) * 20 if draw(st.booleans()) else None
    residual = None
    if draw(st.booleans()):
        values = int8(shape, rng)
        if len(shape) == 4:
            values = values.contiguous(memory_format=torch.channels_last)
        residual = Residual(values, draw(st.floats(-3, 3)), draw(st.sampled_from(X_ZEROS)))
    return Epilogue(multiplier, bias, residual, draw(st.booleans()), draw(st.sampled_from(GRIDS)))


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert actual.stride() == expected.stride()


def output_of(script, environment):
    """What a Python script prints under other environment variables."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout

"""quantize on every backend and dequantize: the reference, fake_quantize, every 16-bit input."""

import os
import subprocess
import sys
from pathlib import Path

import cuda_emulation
import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from dfq_kernels import _backend, fake_quantize
from dfq_kernels.quantize import dequantize, quantize, quantize_reference

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_IDS = ["fp32", "fp16", "bf16"]
EXAMPLES = {"compiled": 150, "triton": 40, "cuda": 80}
GRIDS = [  # zero_point, quant_min, quant_max, offset
    (0.0, -8, 7, 0),
    (3.0, 0, 15, 3),
    (77.0, 0, 255, 128),
    (-100.4, -128, 127, 0),
    (0.0, 0, 127, 0),
]


def _compiled():
    function = _backend.variant("quantize", "compiled", "cpu")
    if function is None:
        pytest.skip("the compiled kernels are not in this install")
    return function


def _assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert actual.stride() == expected.stride()


@st.composite
def tensors(draw, rng):
    """Up to four dimensions, stepped through and permuted."""
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 9, 17, 40]), max_size=4))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in shape]
    base = torch.randn([n * step for n, step in zip(shape, steps, strict=True)], generator=rng) * 3
    x = base[tuple(slice(None, None, step) for step in steps)]
    return x.permute(draw(st.permutations(range(x.ndim)))).to(draw(st.sampled_from(DTYPES)))


def _assert_parity(*args):
    """The backend in force gives what the reference gives, and leaves nothing unwritten."""
    torch.use_deterministic_algorithms(True)  # fills what is empty
    try:
        _assert_same(_backend.implementation("quantize", "cpu")(*args), quantize_reference(*args))
    finally:
        torch.use_deterministic_algorithms(False)


def test_equals_reference(backend):
    @hypothesis.given(data=st.data())
    @hypothesis.settings(deadline=None, max_examples=EXAMPLES[backend], derandomize=True)
    def check(data):
        x = data.draw(tensors(torch.Generator().manual_seed(data.draw(st.integers(0, 99)))))
        zero_point, quant_min, quant_max, offset = data.draw(st.sampled_from(GRIDS))
        scale = torch.tensor([data.draw(st.sampled_from([0.031, 0.25, 1.0]))])
        _assert_parity(x, scale, torch.tensor([zero_point]), quant_min, quant_max, offset)

    check()


SHAPES = {  # whole tiles and parts of them, vectors and single elements
    "images": (2, 3, 41, 40),
    "images, odd": (2, 3, 33, 35),
    "four channels": (2, 4, 18, 30),
    "planes of 7x7": (3, 130, 7, 7),
    "planes of 8x9": (1, 200, 8, 9),
    "vectors of channels": (1, 64, 20, 13),
    "one column": (2, 17, 300, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_planes_become_pixels(backend, shape, dtype):
    """From NCHW; from a part of the channels, and from addresses that are odd."""
    x = (torch.randn(SHAPES[shape]) * 9).to(dtype)
    grid = (torch.tensor([0.1]), torch.tensor([77.0]), 0, 255, 128)
    _assert_parity(x, *grid)
    if backend != "triton" or dtype == torch.bfloat16:
        for view in (torch.cat([x, x], 1)[:, 1 : x.shape[1]], x[..., 1:, :], x.transpose(2, 3)):
            _assert_parity(view, *grid)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_order_of_threads_changes_a_code(shape):
    """What a block brings into shared memory is all there before it is read."""
    with cuda_emulation.use(), cuda_emulation.backwards():
        x = torch.randn(SHAPES[shape]) * 9
        _assert_parity(x, torch.tensor([0.1]), torch.tensor([77.0]), 0, 255, 128)


@pytest.mark.parametrize("size", [1, 4095, 4096, 16_384, 16_391])
def test_blocks_and_what_is_left(backend, size):
    x = torch.randn(size + 1)
    for part in (x[:size], x[1:]):
        _assert_parity(part, torch.tensor([0.1]), torch.zeros(1), -8, 7, 0)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # of the interpreter
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=DTYPE_IDS[1:])
def test_every_half_and_bfloat16(backend, dtype, grid):
    """All 65536 bit patterns: NaN, inf, denormals, both zeros."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    zero_point, quant_min, quant_max, offset = grid
    _assert_parity(
        x, torch.tensor([0.25]), torch.tensor([zero_point]), quant_min, quant_max, offset
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_is_the_grid_of_fake_quantize(backend, grid):
    zero_point, quant_min, quant_max, offset = grid
    scale, zero_point = torch.tensor([0.0731]), torch.tensor([zero_point])
    x = torch.randn(2, 7, 9, 5) * 6
    codes = quantize(x, scale, zero_point, quant_min, quant_max, offset)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert codes.min() == quant_min - offset  # the grid is used up to both ends
    assert codes.max() == quant_max - offset
    expected = fake_quantize(x, scale, zero_point, quant_min, quant_max)
    assert torch.equal(dequantize(codes, scale, zero_point, offset), expected)


def test_ties_go_to_even():
    k = torch.arange(-130, 130)
    codes = quantize((k + 0.5) * 0.25, torch.tensor([0.25]), torch.zeros(1), -128, 127)
    assert torch.equal(codes.long(), torch.where(k % 2 == 0, k, k + 1).clamp(-128, 127))


def test_real_zero_is_stored_as_zero_point_minus_offset():
    x = torch.zeros(4)
    for zero_point, quant_min, quant_max, offset in GRIDS:
        codes = quantize(x, torch.ones(1), torch.tensor([zero_point]), quant_min, quant_max, offset)
        assert codes.tolist() == [round(zero_point) - offset] * 4


SPAN_BORDERS = """
import hashlib, torch
from dfq_kernels import _backend
run, digest = _backend.variant("quantize", "compiled", "cpu"), hashlib.sha256()
for n in (1, 15, 16, 17, 1000, 32767, 32768, 32769, 70001):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        for view in (x, x.expand(1, 3, 2, n)):
            y = run(view, torch.tensor([0.03]), torch.tensor([5.0]), -100, 101, 5)
            digest.update(y.permute(0, 2, 3, 1).numpy().tobytes() if y.ndim == 4 else
                          y.numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    _compiled()
    digests = {
        subprocess.run(
            [sys.executable, "-c", SPAN_BORDERS],
            cwd=ROOT,
            env={**os.environ, "DFQ_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for isa in ("v4", "v3", "v1")
    }
    assert len(digests) == 1


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "flat", "sliced"])
def test_opcheck(layout):
    x = {
        "NCHW": torch.randn(2, 3, 4, 5),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "flat": torch.randn(7).bfloat16(),
        "sliced": torch.randn(4, 6)[::2, 1:],
    }[layout]
    args = (x, torch.tensor([0.1]), torch.zeros(1), -8, 7, 0)
    torch.library.opcheck(torch.ops.dfq.quantize.default, args)


X, ONE, ZERO = torch.ones(4, 3), torch.ones(1), torch.zeros(1)
MISTAKES = {
    "dtype": ((X.double(), ONE, ZERO, -8, 7), "got torch.float64"),
    "scale": ((X, torch.ones(3), ZERO, -8, 7), r"scale must be float32 of shape \[1\]"),
    "zero_point": ((X, ONE, ZERO.int(), -8, 7), "zero_point must be float32"),
    "offset": ((X, ONE, ZERO, 0, 255), "0 to 255 minus 0; choose another offset"),
    "bounds": ((X, ONE, ZERO, 7, 7), "7 to 7"),
    "gradient": ((X.clone().requires_grad_(), ONE, ZERO, -8, 7), "use fake_quantize"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    args, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        quantize(*args)


def test_no_gradient_is_fine_without_one_asked_for():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert quantize(x, ONE, ZERO, -8, 7).dtype == torch.int8

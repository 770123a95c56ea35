"""The Triton kernels of qconv2d and qlinear: every way through them gives the reference's bits."""

import hypothesis
import pytest
import torch
from conftest import BACKENDS
from hypothesis import strategies as st
from integer_cases import X_ZEROS, assert_same, epilogues, int8, weights
from integer_layer_cases import LAYERS, arguments, images, packed_arguments, x_zero

pytest.importorskip("triton")
from dfq_kernels import _backend
from dfq_kernels._triton import integer_layer, integer_pointers
from dfq_kernels.integer import Epilogue, Int8Grid, Residual, integer_weight
from dfq_kernels.packing import pack_channels
from dfq_kernels.qconv2d import Window, qconv2d
from dfq_kernels.qlinear import qlinear

DESCRIPTORS, POINTERS, STEM = "run_descriptors", "run_pointers", "run_stem"


@pytest.fixture
def runs(monkeypatch):
    """Names of the kernels that ran."""
    names = []
    for name in (DESCRIPTORS, POINTERS, STEM):
        run = getattr(integer_layer, name)

        def recorded(*args, run=run, name=name):
            names.append(name)
            run(*args)

        monkeypatch.setattr(integer_layer, name, recorded)
    return names


@pytest.fixture(params=[80, 90], ids=["sm_80", "sm_90"])
def sm(request, monkeypatch):
    monkeypatch.setattr(integer_layer, "architecture", lambda x: request.param)
    return request.param


def _both(op, *args, **options):
    with _backend.use("reference"):
        expected = op(*args, **options)
    with BACKENDS["triton"]():
        assert_same(op(*args, **options), expected)


STEMS = ("stem", "stem of 4", "gray stem")
POINTERS_ALONE = (  # also where there are descriptors
    *("odd stride 2", "49 taps", "odd", "odd 1x1", "padded 1x1", "wider than x"),
    *("grouped", "small groups", "large groups", "part of a block"),
)


def _kernel_of(layer, four_bits, sm):
    if layer in STEMS:
        return STEM
    channels = LAYERS[layer][0][1]
    across_taps = four_bits and channels % 64 and layer != "1x1"
    return POINTERS if sm == 80 or layer in POINTERS_ALONE or across_taps else DESCRIPTORS


@pytest.mark.parametrize("four_bits", [False, True], ids=["w8", "w4"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer, four_bits, sm, runs):
    turn = list(LAYERS).index(layer) + four_bits  # every combination somewhere
    args = arguments(LAYERS[layer], turn, four_bits=four_bits)
    _both(qconv2d, *args, x_zero=x_zero(turn))
    assert runs == [_kernel_of(layer, four_bits, sm)]


@hypothesis.given(data=st.data())
@hypothesis.settings(deadline=None, max_examples=12, derandomize=True)
def test_any_layer(data):
    draw = data.draw
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    inputs, outputs = (draw(st.sampled_from([1, 3, 16, 19, 32])) for _ in range(2))
    pairs = [
        st.tuples(st.integers(low, high), st.integers(low, high))
        for low, high in ((1, 3), (1, 3), (0, 3), (1, 2), (1, 8))
    ]
    kernel, stride, padding, dilation, size = (draw(pair) for pair in pairs)
    window = Window(stride, padding, dilation, groups)
    output_size = window.output_size(size, kernel)
    hypothesis.assume(min(output_size) > 0)
    batch = draw(st.sampled_from([0, 1, 2]))
    weight = draw(weights(rng, (groups * outputs, *kernel, inputs)))
    epilogue = draw(epilogues(rng, weight, (batch, groups * outputs, *output_size)))
    x = images((batch, groups * inputs, *size))
    _both(qconv2d, x, weight, epilogue, window, x_zero=draw(st.sampled_from(X_ZEROS)))


@pytest.mark.parametrize("four_bits", [False, True], ids=["w8", "w4"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(5, 100, 20), (20, 64, 140), (1, 208, 7)])
def test_linear(rows, inputs, outputs, four_bits, sm):
    half = 8 if four_bits else 128
    zero = int8((outputs,), None, -half, half - 1) if rows == 5 else None
    values = int8((outputs, inputs), None, -half, half - 1)
    weight = integer_weight(values, zero, four_bits=four_bits)
    residual = Residual(int8((rows, outputs), None), -0.7, 3)
    epilogue = Epilogue(torch.rand(outputs) / 500, None, residual, rows == 1, Int8Grid(4))
    _both(qlinear, int8((rows, inputs), None), weight, epilogue, x_zero=-9)
    _both(qlinear, int8((rows, inputs), None), weight, Epilogue(torch.rand(outputs)))


@pytest.mark.parametrize("w4", [False, True], ids=["w8", "w4"])
@pytest.mark.parametrize("stride", [1, 2])
def test_packed_activations(w4, stride, sm):
    for out in (True, False):
        args = packed_arguments(stride, four_bits=w4, out=out)
        _both(qconv2d, *args, x_zero=-3)
    rows = pack_channels(int8((5, 128), None, -8, 7), -1)
    weight = integer_weight(int8((192, 128), None, -8, 7), four_bits=w4)
    grid = Int8Grid(1, -7, 7, True)
    _both(qlinear, rows, weight, Epilogue(torch.rand(192) / 50, grid=grid), x_zero=2)


@pytest.mark.parametrize("layer", ["3x3", "shortcut", "1x1", "grouped"])
def test_offsets_beyond_32_bits(layer, monkeypatch):
    """The same layers as if their offsets were."""
    monkeypatch.setattr(integer_layer, "architecture", lambda x: 80)
    monkeypatch.setattr(integer_pointers, "reaches_far", lambda layer, tile: True)
    x_shape, weight_shape, window = LAYERS[layer]
    weight = integer_weight(int8(weight_shape, None))
    epilogue = Epilogue(torch.rand(weight_shape[0]))
    _both(qconv2d, images(x_shape), weight, epilogue, window, x_zero=-1)


def test_tensors_that_begin_anywhere(sm, runs):
    """A descriptor must begin at a multiple of 16 bytes."""
    x = int8((3 * 64 + 1,), None)[1:].view(3, 64)
    _both(qlinear, x, integer_weight(int8((5, 64), None)), Epilogue(torch.rand(5)))
    assert runs == [POINTERS]


@pytest.mark.parametrize("value", [127, -128])
def test_the_largest_sums(value):
    """Of packed weights, whose products are added 16 times as large."""
    size = 16384
    weight = integer_weight(torch.full((1, size), -8, dtype=torch.int8), four_bits=True)
    x = torch.full((1, size), value, dtype=torch.int8)
    _both(qlinear, x, weight, Epilogue(torch.ones(1)), x_zero=-value - 1)


def test_zero_has_one_sign():
    x, weight = torch.zeros(1, 4, dtype=torch.int8), integer_weight(int8((3, 4), None))
    with BACKENDS["triton"]():
        y = qlinear(x, weight, Epilogue(torch.tensor([-1.0, 1.0, -0.5])))
    assert not y.signbit().any()


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("relu", [False, True], ids=["", "relu"])
@pytest.mark.parametrize("grid", [None, Int8Grid(3)], ids=["float", "int8"])
def test_what_is_no_number(relu, grid):
    multiplier = torch.tensor([3e38, -3e38, 1.0, 3e38])
    bias = torch.tensor([-torch.inf, 0.0, torch.nan, 0.0])
    x, weight = torch.full((2, 4), 127, dtype=torch.int8), integer_weight(int8((4, 4), None, 1))
    with _backend.use("reference"):
        expected = qlinear(x, weight, Epilogue(multiplier, bias, None, relu, grid))
    with BACKENDS["triton"]():
        y = qlinear(x, weight, Epilogue(multiplier, bias, None, relu, grid))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)

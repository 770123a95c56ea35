"""Depthwise convolutions on every backend against the reference, bit for bit."""

import pytest
import torch
from conftest import BACKENDS
from depthwise_cases import LAYERS, Layer
from integer_cases import assert_same, int8

from dfq_kernels import _backend
from dfq_kernels.qconv2d import Window, qconv2d_reference


@pytest.fixture(autouse=True)
def _unwritten_memory_shows():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _assert_parity(args):
    """Of the backend in force."""
    assert_same(_backend.implementation("qconv2d", "cpu")(*args), qconv2d_reference(*args))


@pytest.mark.parametrize("layer", LAYERS)
def test_layers(backend, layer):
    """With every option, alone and beside others, and weights of 8 and of 4 bits."""
    torch.manual_seed(0)
    number = list(LAYERS).index(layer)
    _assert_parity(LAYERS[layer].arguments(number, grid=()))
    _assert_parity(LAYERS[layer].arguments(15 - number % 16, four_bits=True))


@pytest.mark.parametrize("number", range(16))
def test_options(backend, number):
    """With 5 channels and with 4."""
    for channels in (4, 5):
        layer = Layer((1, channels, 4, 5))
        _assert_parity(layer.arguments(number, four_bits=number % 3 == 0))


def test_no_images(backend):
    _assert_parity(Layer((0, 3, 4, 5)).arguments(0))


@pytest.mark.parametrize("groups", [1, 6])
def test_gaps_between_the_terms_of_channels(backend, groups):
    """As expanded and sliced vectors have them."""
    args = list(Layer((1, 6, 4, 5)).arguments(15))
    args[1] = int8((6, 3, 3, 6 // groups), None)
    args[9] = groups
    for at in (2, 10, 11):  # zeros, multiplier and bias
        args[at] = args[at].repeat_interleave(3)[::3]
    _assert_parity(args)
    args[10] = args[10][:1].expand(6)
    _assert_parity(args)


LARGE = {  # more rows than a thread goes down
    "3x3": Layer((2, 132, 37, 5)),
    "3x3/2, dilated": Layer((1, 12, 41, 9), window=Window((2, 1), (2, 1), (1, 2))),
    "3x3/5": Layer((2, 8, 90, 4), window=Window((5, 1), (1, 1))),
    "5x5": Layer((1, 8, 19, 7), (5, 5), Window(padding=(2, 3))),
    "7x7/4": Layer((1, 8, 77, 7), (7, 7), Window((4, 1), (2, 3))),
}


@pytest.mark.parametrize("layer", LARGE)
def test_columns_of_threads(layer):
    """CUDA C++ alone: there a thread goes down a column of outputs."""
    with BACKENDS["cuda"]():
        for number in range(16):
            _assert_parity(LARGE[layer].arguments(number, four_bits=number % 3 == 0))


BLOCKS = [(1, 1), (1, 2), (2, 2), (2, 4), (7, 1)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_block_of_outputs(monkeypatch, block, stride):
    """Large layers share pixels in blocks, and programs take several tiles of them."""
    pytest.importorskip("triton")
    from dfq_kernels._triton import depthwise as ops

    monkeypatch.setattr(ops, "blocks_of", lambda *_: block)
    monkeypatch.setattr(ops, "ENOUGH_PROGRAMS", 2)
    layer = Layer((2, 34, 6, 7), (3, 3), Window((stride, stride), (1, 1)))
    args = layer.arguments(7)
    with BACKENDS["triton"]():
        assert_same(ops.depthwise(*args), qconv2d_reference(*args))


def test_blocks_of_networks():
    """MobileNet's layers, in images of 256 and of 1."""
    pytest.importorskip("triton")
    from dfq_kernels._triton.depthwise import blocks_of

    def block(size, channels, kernel=3, stride=1):
        return [
            blocks_of((size, size), (kernel, kernel), (stride, stride), (1, 1), batch * channels)
            for batch in (256, 1)
        ]

    assert block(112, 32) == [(2, 4), (1, 1)]
    assert block(56, 64, stride=2) == [(2, 2), (1, 1)]
    assert block(7, 1024) == [(7, 1), (1, 1)]
    assert block(28, 96, kernel=5) == [(2, 2), (1, 1)]
    assert block(14, 384, kernel=9) == [(1, 1), (1, 1)]

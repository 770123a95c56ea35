"""The CUDA kernels of qlinear and qconv2d on the CPU: what only they have, on every kind of GPU."""

import dataclasses

import cuda_emulation
import pytest
import torch
from integer_cases import assert_same, int8

from dfq_kernels import _backend
from dfq_kernels.integer import Epilogue, Int8Grid, Residual, integer_weight
from dfq_kernels.packing import pack_channels
from dfq_kernels.qconv2d import Window, qconv2d
from dfq_kernels.qlinear import qlinear

LAST = torch.channels_last
GPUS = [75, 80, 90]  # no asynchronous copies; all; no products of 4-bit integers
STORED = {  # whether x and the weights are packed
    "x8w8": (False, False),
    "x8w4": (False, True),
    "x4w8": (True, False),
    "x4w4": (True, True),
}


@pytest.fixture(autouse=True)
def emulation():
    with cuda_emulation.use():
        yield cuda_emulation.load()


def _codes(shape, bits):
    half = 2 ** (bits - 1)
    values = int8(shape, None, -half, half - 1)
    return values.contiguous(memory_format=LAST) if len(shape) == 4 else values


def _layer(stored, inputs=64, outputs=128, size=(13, 12)):
    """Arguments of a convolution: rows for more than one tile, steps for more than all stages."""
    packed_x, packed_weight = STORED[stored]
    x_bits, weight_bits = (4 if packed else 8 for packed in (packed_x, packed_weight))
    x = _codes((1, inputs, *size), x_bits)
    shape, half = (outputs, 3, 3, inputs), 2 ** (weight_bits - 1)
    zero = int8((outputs,), None, -half, half - 1)
    weight = integer_weight(_codes((outputs, 9, inputs), weight_bits).view(shape), zero)
    if packed_weight:
        weight = integer_weight(weight.values, zero, four_bits=True)
    window, can = Window(padding=(1, 2)), outputs % 64 == 0
    added = _codes((1, outputs, *window.output_size(size, (3, 3))), 4)
    residual = Residual(pack_channels(added) if can else added, 0.4, -3)
    multiplier = torch.rand(outputs) * 8 / (2 ** (x_bits + weight_bits) * (9 * inputs) ** 0.5)
    epilogue = Epilogue(multiplier, torch.randn(outputs), residual, False, Int8Grid(1, -8, 7, can))
    return pack_channels(x) if packed_x else x, weight, epilogue, window


def _both(*args, op=qconv2d, **options):
    """The result, which is that of the reference."""
    with _backend.use("reference"):
        expected = op(*args, **options)
    found = op(*args, **options)
    assert_same(found, expected)
    return found


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("stored", STORED)
def test_every_gpu_and_every_way_to_store(stored, gpu):
    with cuda_emulation.architecture(gpu):
        assert _both(*_layer(stored), x_zero=5).unique().numel() > 100
        if stored.startswith("x8"):  # seven channels are gathered byte by byte
            _both(*_layer(stored, 7, 70), x_zero=-128)


@pytest.mark.parametrize(("stored", "gpu"), [("x8w4", 80), ("x4w4", 90)])
def test_wide_tiles(stored, gpu):
    """Of 128 channels, where there are enough of them; some of the last are not there."""
    packed_x, packed_weight = STORED[stored]
    x = _codes((1100, 64), 4)
    values = _codes((15 * 128 - 64, 64), 4)
    weight = integer_weight(values, four_bits=packed_weight)
    grid = Int8Grid(0, -8, 7, packed_x)
    epilogue = Epilogue(torch.rand(len(values)) / 50, grid=grid)
    x = pack_channels(x, -1) if packed_x else x
    with cuda_emulation.architecture(gpu):
        _both(x, weight, epilogue, op=qlinear, x_zero=-2)


def _off(tensor, by):
    """The same tensor, `by` bytes off an address that is a multiple of 16."""
    room = torch.empty(tensor.numel() + 16, dtype=tensor.dtype)
    assert room.data_ptr() % 16 == 0
    return room[by:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("what", ["x", "weight", "residual"])
@pytest.mark.parametrize("stored", STORED)
def test_tensors_that_begin_off_sixteen_bytes(stored, what):
    x, weight, epilogue, window = _layer(stored, size=(4, 5))
    if what == "x":
        x = _off(x, 4)
    elif what == "weight":
        weight = dataclasses.replace(weight, values=_off(weight.values, 8))
    else:
        residual = Residual(_off(epilogue.residual.values, 1), 0.4, -3)
        epilogue = Epilogue(epilogue.multiplier, residual=residual, grid=Int8Grid())
    _both(x, weight, epilogue, window)


def test_values_of_channels_that_are_not_neighbours():
    x, weight, epilogue, window = _layer("x8w8", size=(4, 5))
    apart = [torch.stack((t, t), 1)[:, 0] for t in (epilogue.multiplier, epilogue.bias)]
    zero = torch.stack((weight.zero, weight.zero), 1)[:, 0]
    weight = dataclasses.replace(weight, zero=zero)
    _both(x, weight, Epilogue(*apart), window, x_zero=1)


BOUNDS = {  # stored, K, x, x_zero, weight: the largest sums of packed integers
    "x8w4": (65792, -128, 127, -8),
    "x4w8": (65792, -8, 7, -128),
    "x4w4": (65792, -8, 7, -8),
}


@pytest.mark.parametrize("stored", BOUNDS)
def test_sums_at_the_bound(stored):
    """Unpacked they are 16 or 256 times as large in between, which int32 holds as well."""
    size, value, x_zero, integer = BOUNDS[stored]
    packed_x, packed_weight = STORED[stored]
    x = torch.full((1, size), value, dtype=torch.int8)
    x = pack_channels(x, -1) if packed_x else x
    values = torch.full((1, size), integer, dtype=torch.int8)
    weight = integer_weight(values, four_bits=packed_weight)
    with cuda_emulation.architecture(90):
        y = qlinear(x, weight, Epilogue(torch.ones(1)), x_zero=x_zero)
    assert y.item() == float(torch.tensor(size * (value - x_zero) * integer).float())


@pytest.mark.parametrize("gpu", GPUS)
def test_the_order_of_threads_and_blocks_changes_no_bit(gpu):
    for stored in ("x8w8", "x4w4"):
        args = _layer(stored)
        with cuda_emulation.architecture(gpu):
            forwards = qconv2d(*args, x_zero=3)
            with cuda_emulation.backwards():
                assert torch.equal(qconv2d(*args, x_zero=3), forwards)


def test_what_no_layer_has_is_refused():
    """By the op itself, where nothing in Python has checked it."""
    ones, grid = torch.ones(64), [0, -8, 7, 1]
    x, weight = torch.zeros(2, 64, dtype=torch.int8), torch.zeros(64, 64, dtype=torch.int8)

    def linear(
        x=x, weight=weight, zero=None, x_zero=0, multiplier=ones, residual=None, grid=(), at=0
    ):
        rest = (multiplier, None, residual, 1.0, at, False, list(grid))
        return torch.ops.dfq_emulated.qlinear(x, weight, zero, None, x_zero, *rest)

    def conv(x, kernel=(1, 1), padding=(0, 0), groups=1, grid=()):
        geometry = ([*kernel], [1, 1], [*padding], [1, 1], groups)
        rest = (ones, None, None, 1.0, 0, False, list(grid))
        return torch.ops.dfq_emulated.qconv2d(x, weight, None, None, 0, *geometry, *rest)

    images = torch.zeros(1, 64, 5, 5, dtype=torch.int8)
    many = torch.zeros(1, 65794, dtype=torch.int8)
    for message, call in {
        "x must be int8": lambda: linear(x.float()),
        "x may be packed only with": lambda: linear(x[:, :24].contiguous().byte()),
        "contiguous": lambda: linear(x.T),
        "sums of 65794 products": lambda: linear(many, many, multiplier=torch.ones(1)),
        "64 contiguous rows of 64 bytes": lambda: linear(weight=weight[:, :32].contiguous()),
        "weights must be int8": lambda: linear(weight=weight.float()),
        "x_zero must be -128 to 127": lambda: linear(x_zero=128),
        "one value for each of 64": lambda: linear(zero=torch.zeros(3, dtype=torch.int8)),
        "in the shape of the output": lambda: linear(residual=x[:1]),
        "zero of the residual": lambda: linear(residual=x, at=-129),
        "grid of the output must be -8": lambda: linear(grid=[0, -9, 7, 1]),
        "and 1 if it is packed": lambda: linear(grid=[0, 1]),
        "a packed output has a multiple": lambda: linear(multiplier=torch.ones(60), grid=grid),
        "channels_last memory": lambda: conv(images),
        "larger than the image": lambda: conv(images.contiguous(memory_format=LAST), (6, 1)),
        "groups must divide": lambda: conv(images.contiguous(memory_format=LAST), groups=3),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def test_the_ops_are_emulated():
    for op in ("qlinear", "qconv2d"):
        assert _backend.implementation(op, "cpu") == getattr(torch.ops.dfq_emulated, op)

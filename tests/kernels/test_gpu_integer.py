"""qconv2d and qlinear on a GPU: the reference on the CPU, bit for bit."""

from dataclasses import replace

import pytest
import torch
from integer_cases import int8
from integer_layer_cases import LAYERS, arguments, images, packed_arguments, x_zero
from on_gpu import CUDA, DEVICE, DRY_RUN, FEW, MARKS, assert_same, backends, use

from dfq_kernels import Epilogue, Int8Grid, Window, _backend, integer_weight, qconv2d, qlinear

pytestmark = MARKS

NETWORKS = {  # x, weights, window: whole tiles and parts of them, of every shape
    "stem": ((8, 3, 224, 224), (64, 7, 7, 3), Window((2, 2), (3, 3))),
    "3x3 of 64": ((16, 64, 56, 56), (64, 3, 3, 64), Window(padding=(1, 1))),
    "3x3 of 128": ((32, 128, 28, 28), (128, 3, 3, 128), Window(padding=(1, 1))),
    "3x3 of 512": ((8, 512, 7, 7), (512, 3, 3, 512), Window(padding=(1, 1))),
    "one image": ((1, 256, 14, 14), (256, 3, 3, 256), Window(padding=(1, 1))),
    "3x3/2": ((16, 128, 28, 28), (256, 3, 3, 128), Window((2, 2), (1, 1))),
    "3x3/2 of odd size": ((8, 256, 15, 15), (256, 3, 3, 256), Window((2, 2), (1, 1))),
    "1x1 up": ((16, 64, 56, 56), (256, 1, 1, 64), Window()),
    "1x1 down": ((16, 256, 56, 56), (64, 1, 1, 256), Window()),
    "1x1 wide": ((64, 1024, 14, 14), (256, 1, 1, 1024), Window()),
    "shortcut": ((16, 256, 56, 56), (512, 1, 1, 256), Window((2, 2))),
    "grouped": ((8, 128, 28, 28), (128, 3, 3, 4), Window(padding=(1, 1), groups=32)),
    "dilated": ((4, 256, 28, 28), (256, 3, 3, 256), Window((1, 1), (4, 4), (4, 4))),
    "odd channels": ((8, 50, 20, 21), (70, 3, 3, 50), Window(padding=(1, 1))),
}
four_bits = pytest.mark.parametrize("four_bits", [False, True], ids=["w8", "w4"])


def _moved(value):
    """An argument of the ops on the device."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    fields = getattr(value, "__dataclass_fields__", {})
    moved = {name: _moved(getattr(value, name)) for name in fields}
    return replace(value, **moved) if fields else value


def _parity(backend, op, *args, **options):
    with _backend.use("reference"):
        expected = op(*args, **options)
    with use(backend, op.__name__):
        y = op(*map(_moved, args), **options)
    assert_same(y, expected)
    assert y.stride() == expected.stride()


@backends
@four_bits
@pytest.mark.parametrize("layer", list(LAYERS)[FEW])
def test_layers(backend, layer, four_bits):
    turn = list(LAYERS).index(layer) + four_bits
    args = arguments(LAYERS[layer], turn, four_bits=four_bits)
    _parity(backend, qconv2d, *args, x_zero=x_zero(turn))


@backends
@pytest.mark.parametrize("layer", ["3x3", "part of a block", "stride 2", "stem", "odd", "1x1"][FEW])
def test_small_shapes(backend, layer):
    """Enough for a memory checker, which is slow."""
    args = arguments(LAYERS[layer], 1)
    _parity(backend, qconv2d, *args, x_zero=3)
    _parity(backend, qlinear, *_linear(5, 96, 20, True), x_zero=-9)


@pytest.mark.skipif(DRY_RUN, reason="the interpreter is slow")
@backends
@four_bits
@pytest.mark.parametrize("layer", NETWORKS)
@pytest.mark.parametrize("turn", [2, 7, 9])  # without a residual; with all in int8, in float32
def test_layers_of_networks(backend, layer, four_bits, turn):
    args = arguments(NETWORKS[layer], turn, four_bits=four_bits)
    _parity(backend, qconv2d, *args, x_zero=x_zero(turn))


@backends
@four_bits
@pytest.mark.parametrize("stride", [1, 2])
def test_packed_activations(backend, four_bits, stride):
    for out in (True, False):
        args = packed_arguments(stride, four_bits=four_bits, out=out)
        _parity(backend, qconv2d, *args, x_zero=-3)


def _linear(rows, inputs, outputs, four_bits):
    half = 8 if four_bits else 128
    zero = int8((outputs,), None, -half, half - 1) if rows % 2 else None
    values = int8((outputs, inputs), None, -half, half - 1)
    weight = integer_weight(values, zero, four_bits=four_bits)
    multiplier, grid = torch.rand(outputs) / 500, None if rows % 2 else Int8Grid(4)
    epilogue = Epilogue(multiplier, torch.randn(outputs), None, rows % 3 == 0, grid)
    return int8((rows, inputs), None), weight, epilogue


LINEAR = [(5, 100, 20), (1, 512, 1000), (256, 2048, 1000), (300, 1024, 512), (4096, 256, 256)]


@backends
@four_bits
@pytest.mark.parametrize("shape", LINEAR[: 1 if DRY_RUN else None], ids=str)
def test_linear(backend, four_bits, shape):
    for zero in (0, -128):
        _parity(backend, qlinear, *_linear(*shape, four_bits), x_zero=zero)


@backends
@pytest.mark.parametrize("value", [127, -128])
def test_the_largest_sums(backend, value):
    size = 64 if DRY_RUN else 65793
    weight = integer_weight(torch.full((16, size), -128, dtype=torch.int8))
    x = torch.full((16, size), value, dtype=torch.int8)
    _parity(backend, qlinear, x, weight, Epilogue(torch.ones(16)), x_zero=-1 - value)


STEPS = {"qconv2d": arguments(LAYERS["3x3"], 7), "qlinear": _linear(64, 128, 64, True)}
ops = pytest.mark.parametrize("op", STEPS)


def _step(op):
    """The op, and its arguments on the device."""
    return {"qconv2d": qconv2d, "qlinear": qlinear}[op], [_moved(value) for value in STEPS[op]]


@backends
@ops
def test_same_bits_again(backend, op):
    function, args = _step(op)
    with use(backend, op):
        first = function(*args, x_zero=3)
        for _ in range(1 if DRY_RUN else 5):
            assert torch.equal(function(*args, x_zero=3), first)


@pytest.mark.skipif(not CUDA, reason="a CPU has no such graphs, and nobody to wait for")
@backends
@ops
def test_waits_for_nothing_and_in_a_cuda_graph(backend, op):
    """Captured once and replayed on other values: what eager mode gives."""
    function, args = _step(op)
    with use(backend, op):
        function(*args, x_zero=3)  # compiles
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*args, x_zero=3)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = function(*args, x_zero=3)
        args[0].copy_(_moved(int8(tuple(args[0].shape), None)))
        graph.replay()
        try:
            torch.cuda.set_sync_debug_mode("error")
            expected = function(*args, x_zero=3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(captured, expected)


@backends
@pytest.mark.parametrize("layer", ["plain", "padded"])
def test_the_end_of_large_tensors(backend, layer):
    """More elements than a 32-bit offset reaches."""
    if CUDA and torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("takes 20 GB of memory on the GPU")
    batch, kernel = 8 if DRY_RUN else 2**15 + 8, 1 if layer == "plain" else 3
    weight = _moved(integer_weight(int8((16, kernel, kernel, 64), None)))
    x = torch.randint(-128, 128, (batch, 32, 32, 64), dtype=torch.int8, device=DEVICE)
    x = x[:, : 4 if DRY_RUN else 32, : 4 if DRY_RUN else 32].contiguous().permute(0, 3, 1, 2)
    window = Window(padding=(kernel // 2,) * 2)
    args = (weight, _moved(Epilogue(torch.rand(16) / 500, grid=Int8Grid())), window)
    with use(backend, "qconv2d"):
        end = qconv2d(images((2, 64, *x.shape[2:])).to(DEVICE).copy_(x[-2:]), *args, x_zero=1)
        assert torch.equal(qconv2d(x, *args, x_zero=1)[-2:], end)

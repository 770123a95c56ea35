"""quantize, requantize and depthwise qconv2d on a GPU: the reference on the CPU, bit for bit."""

import pytest
import torch
from depthwise_cases import LAYERS, Layer
from on_gpu import (
    CUDA,
    DEVICE,
    DRY_RUN,
    FEW,
    LAYOUTS,
    MARKS,
    SHAPES,
    assert_same,
    backends,
    dtypes,
    layouts,
    reference,
    to_device,
    use,
    variant,
)

from dfq_kernels import Int8Grid, Window, quantize, requantize

pytestmark = MARKS

# [B, C, H, W]: parts of tiles and whole ones, vectors of pixels and of channels, and none
PLANES = [(3, 3, 41, 40), (2, 4, 224, 224), (2, 130, 7, 7), (1, 256, 56, 56), (5, 64, 13, 3)]
GRIDS = [(-8, 7, 0.0, 0), (0, 255, 77.0, 128), (0, 15, 2.5, 2)]
NETWORKS = {  # layers of MobileNets: blocks of outputs that share pixels, and columns of many rows
    "3x3": Layer((8, 64, 56, 56)),
    "3x3/2": Layer((8, 144, 57, 55), window=Window((2, 2), (1, 1))),
    "7x7 image": Layer((16, 960, 7, 7)),
    "5x5": Layer((4, 240, 28, 28), (5, 5), Window(padding=(2, 2))),
    "7x7": Layer((4, 96, 28, 28), (7, 7), Window(padding=(3, 3))),
    "one image": Layer((1, 32, 112, 112)),
}


def _quantize_parity(backend, x, on_device, grid):
    quant_min, quant_max, zero_point, offset = grid
    args = (torch.tensor([0.1]), torch.tensor([zero_point]), quant_min, quant_max, offset)
    codes = variant("quantize", backend)(on_device, *to_device(*args))
    expected = reference("quantize", x, *args)
    assert_same(codes, expected)
    assert codes.stride() == expected.stride()


@backends
@dtypes
@layouts
def test_quantize(backend, dtype, layout):
    for shape in [*SHAPES, *PLANES[: 0 if DRY_RUN else None]]:
        base = (torch.randn(shape) * 9).to(dtype)
        x, on_device = LAYOUTS[layout](base), LAYOUTS[layout](base.to(DEVICE))
        for grid in GRIDS[FEW]:
            _quantize_parity(backend, x, on_device, grid)


@backends
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_small_shapes(backend, layout):
    """Enough for a memory checker, which is slow."""
    for shape in ((2, 5, 7, 3), (1, 64, 4, 4), (2, 3, 9, 9)):
        for dtype in (torch.float32, torch.bfloat16):
            base = (torch.randn(shape) * 9).to(dtype)
            x, on_device = LAYOUTS[layout](base), LAYOUTS[layout](base.to(DEVICE))
            _quantize_parity(backend, x, on_device, GRIDS[0])
    _requantize_parity(backend, torch.randint(-128, 128, (8200,), dtype=torch.int8))


@backends
def test_depthwise_of_small_shapes(backend):
    """As above."""
    for layer in ("3x3", "two outputs a channel"):
        _depthwise_parity(backend, LAYERS[layer].arguments(15))


@backends
@dtypes
def test_values_that_are_hard_to_round(backend, dtype):
    ties = torch.arange(-300, 300) + 0.5
    odd = [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, -1e-45, 2.0**-126, 3e38, -6e4]
    values = [ties * 0.1, (ties * 0.1).nextafter(ties), torch.tensor(odd)]
    x = torch.cat(values).to(dtype)
    for grid in GRIDS[FEW]:
        _quantize_parity(backend, x, x.to(DEVICE), grid)


def _requantize_parity(backend, codes, on_device=None):
    for args in ((0.3, 0.7, 5, -3, -100, 90), (0.011, 0.19, 0, 0, 0, 15), (3.0, 1.0, 9, 0, -2, 1)):
        found = variant("requantize", backend)(
            codes.to(DEVICE) if on_device is None else on_device, *args
        )
        assert_same(found, reference("requantize", codes, *args))


@backends
def test_requantize(backend):
    _requantize_parity(backend, torch.arange(-128, 128).to(torch.int8))
    for size in (1, 17, 300) if DRY_RUN else (1, 8191, 8192, 8193, 3_000_001):
        codes = torch.randint(-128, 128, (size + 1,), dtype=torch.int8)
        on_device = codes.to(DEVICE)
        _requantize_parity(backend, codes[1:], on_device[1:])


def _depthwise_parity(backend, args):
    y, expected = variant("qconv2d", backend)(*to_device(*args)), reference("qconv2d", *args)
    assert_same(y, expected)
    assert y.stride() == expected.stride()


@backends
@pytest.mark.parametrize("layer", list(LAYERS)[FEW])
def test_depthwise(backend, layer):
    torch.manual_seed(0)
    for number in range(15, -1, -16 if DRY_RUN else -1):
        for four_bits in (False, True):
            grid = () if number % 3 == 0 else (-3, -100, 90)
            _depthwise_parity(
                backend, LAYERS[layer].arguments(number, four_bits=four_bits, grid=grid)
            )


@pytest.mark.skipif(DRY_RUN, reason="too large for a CPU")
@backends
@pytest.mark.parametrize("layer", NETWORKS)
def test_depthwise_layers_of_networks(backend, layer):
    torch.manual_seed(0)
    for number in (0, 10, 15):
        _depthwise_parity(backend, NETWORKS[layer].arguments(number, four_bits=number == 10))


@pytest.mark.skipif(not CUDA, reason="on a CPU there is nobody to wait for")
@backends
def test_waits_for_nothing_and_repeats(backend):
    x = torch.randn(8, 64, 57, 56, device=DEVICE)
    scale, zero = torch.tensor([[0.1], [3.0]], device=DEVICE)
    layer = to_device(*NETWORKS["3x3"].arguments(15))
    depthwise = variant("qconv2d", backend)

    def run():
        codes = quantize(x, scale, zero, -100, 100)
        again = requantize(codes, (0.1, 0.3), 3, Int8Grid(0, 0, 15))
        return codes, again, depthwise(*layer)

    with use(backend, "quantize", "requantize", "qconv2d"):
        first = run()  # which compiles
        try:
            torch.cuda.set_sync_debug_mode("error")
            second = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(second, first, rtol=0, atol=0)


@backends
def test_the_end_of_a_large_quantize(backend):
    """More elements than a 32-bit offset reaches, from both layouts."""
    if CUDA and torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("takes 20 GB of memory on the GPU")
    shape = (2, 3, 5, 6) if DRY_RUN else (2**15 + 1, 64, 32, 33)
    args = to_device(torch.tensor([0.1]), torch.zeros(1), -100, 100, 0)
    function = variant("quantize", backend)
    x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    for last in (False, True):
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        end = function(x[-2:].contiguous(), *args)
        torch.testing.assert_close(function(x, *args)[-2:], end, rtol=0, atol=0)

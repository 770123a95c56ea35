"""Small layers for qconv2d: every way through the kernels of a GPU, with all that may be added."""

from __future__ import annotations

from typing import Any

import torch
from integer_cases import int8
from torch import Tensor

from dfq_kernels.integer import Epilogue, Int8Grid, IntegerWeight, Residual, integer_weight
from dfq_kernels.packing import pack_channels
from dfq_kernels.qconv2d import Window

LAYERS = {  # x, weights, window
    "3x3": ((2, 64, 5, 4), (48, 3, 3, 64), Window(padding=(1, 1))),
    "3x3 of few pixels": ((1, 128, 3, 3), (40, 3, 3, 128), Window(padding=(1, 1))),
    "3x3 of 48": ((2, 48, 5, 4), (70, 3, 3, 48), Window(padding=(2, 1))),
    "stride 2": ((2, 64, 6, 4), (48, 3, 3, 64), Window((2, 2), (1, 1))),
    "dilated": ((1, 96, 4, 4), (20, 3, 2, 96), Window((2, 2), (2, 1), (2, 1))),
    "1x1": ((2, 64, 5, 4), (80, 1, 1, 64), Window()),
    "shortcut": ((1, 32, 4, 6), (32, 1, 1, 32), Window((2, 2))),
    "odd stride 2": ((1, 64, 5, 4), (40, 3, 3, 64), Window((2, 2), (1, 1))),
    "stem": ((2, 3, 9, 8), (20, 7, 7, 3), Window((2, 2), (3, 3))),
    "stem of 4": ((1, 4, 5, 6), (70, 3, 3, 4), Window((1, 2), (2, 1), (2, 1))),
    "gray stem": ((3, 1, 4, 5), (16, 5, 8, 1), Window(padding=(2, 4))),
    "49 taps": ((1, 5, 5, 5), (16, 7, 7, 5), Window(padding=(3, 3))),
    "odd": ((2, 20, 4, 5), (17, 2, 3, 20), Window((2, 1), (1, 2), (2, 1))),
    "odd 1x1": ((2, 33, 5, 4), (32, 1, 1, 33), Window((2, 2))),
    "padded 1x1": ((1, 8, 3, 3), (16, 1, 1, 8), Window((2, 3), (2, 1))),
    "wider than x": ((1, 8, 3, 3), (16, 5, 5, 8), Window(padding=(4, 4))),
    "grouped": ((1, 64, 4, 4), (32, 3, 3, 16), Window(padding=(1, 1), groups=4)),
    "small groups": ((1, 9, 3, 4), (15, 2, 2, 3), Window(groups=3)),
    "large groups": ((1, 96, 3, 3), (72, 3, 3, 48), Window(padding=(1, 1), groups=2)),
    "part of a block": ((1, 34, 4, 5), (34, 3, 3, 2), Window(padding=(1, 1), groups=17)),
}


Arguments = tuple[Tensor, IntegerWeight, Epilogue, Window]  # of qconv2d


def images(shape: tuple[int, ...], low: int = -128, high: int = 127) -> Tensor:
    return int8(shape, None, low, high).contiguous(memory_format=torch.channels_last)


def arguments(layer: Any, turn: int, *, four_bits: bool = False) -> Arguments:
    """Of qconv2d, for a line of LAYERS; with each ``turn`` something else is added."""
    x_shape, weight_shape, window = layer
    half = 8 if four_bits else 128
    zero = int8(weight_shape[:1], None, -half, half - 1) if turn % 2 else None
    weight = integer_weight(int8(weight_shape, None, -half, half - 1), zero, four_bits=four_bits)
    shape = (x_shape[0], weight_shape[0], *window.output_size(x_shape[2:], weight_shape[1:3]))
    multiplier = torch.rand(shape[1]) / half / torch.Size(weight_shape[1:]).numel() ** 0.5
    epilogue = Epilogue(
        multiplier,
        torch.randn(shape[1]) if turn % 5 else None,
        Residual(images(shape), 0.3, -5) if turn % 2 else None,
        turn % 4 == 0,
        None if turn % 3 == 0 else Int8Grid(-5, -100, 90),
    )
    return images(x_shape), weight, epilogue, window


def x_zero(turn: int) -> int:
    """The zero that goes with it."""
    return (0, 3, -128)[turn % 3]


def packed_arguments(stride: int, *, four_bits: bool, out: bool) -> Arguments:
    """Of qconv2d, with 4-bit activations two in a byte; also the outputs if ``out``."""
    weight = int8((64, 2, 2, 64), None, -8, 7), int8((64,), None, -8, 7)
    window = Window((stride, stride), (1, 1))
    added = images((2, 64, *window.output_size((2, 4), (2, 2))), -8, 7)
    residual = Residual(pack_channels(added) if four_bits or not out else added, 0.4, 5)
    grid = Int8Grid(-2, -8, 7, packed=True) if out else Int8Grid(3)
    epilogue = Epilogue(torch.rand(64) / 150, torch.randn(64), residual, False, grid)
    x = pack_channels(images((2, 64, 2, 4), -8, 7))
    return x, integer_weight(*weight, four_bits=four_bits), epilogue, window

"""Layers with a group for each channel, for the tests of depthwise convolutions."""

from dataclasses import dataclass

import torch
from integer_cases import X_ZEROS, int8

from dfq_kernels.integer import integer_weight
from dfq_kernels.qconv2d import Window

LAST = torch.channels_last
PADDED = Window(padding=(1, 1))


@dataclass(frozen=True)
class Layer:
    """A convolution with a group for each channel."""

    shape: tuple[int, int, int, int]  # of x
    kernel: tuple[int, int] = (3, 3)
    window: Window = PADDED
    multiple: int = 1  # outputs of a channel

    def arguments(self, number, *, four_bits=False, grid=(-3, -100, 90)):
        """Those of qconv2d; what is optional is there or not as the bits of ``number`` say."""
        zeros, residual, relu, bias = (bool(number >> bit & 1) for bit in range(4))
        batch, groups, *size = self.shape
        channels, half = groups * self.multiple, 8 if four_bits else 128
        values = int8((channels, *self.kernel, 1), None, -half, half - 1)
        weight = integer_weight(values, None, four_bits=four_bits).values
        pairs = self.window.stride, self.window.padding, self.window.dilation
        shape = (batch, channels, *self.window.output_size(tuple(size), self.kernel))
        added = int8(shape, None).contiguous(memory_format=LAST) if residual else None
        spread = half * 30 * (self.kernel[0] * self.kernel[1]) ** 0.5
        return (
            int8(self.shape, None).contiguous(memory_format=LAST),
            weight,
            int8((channels,), None, -half, half - 1) if zeros else None,
            None,
            X_ZEROS[number % 4],
            *map(list, (self.kernel, *pairs)),
            groups,
            torch.rand(channels) * 40 / spread,
            torch.randn(channels) * 20 if bias else None,
            added,
            0.37,
            5,
            relu,
            list(grid),
        )


LAYERS = {  # whole and part tiles, blocks and vectors
    "3x3": Layer((2, 20, 5, 7)),
    "3x3/2": Layer((1, 16, 8, 7), window=Window((2, 2), (1, 1))),
    "5x3": Layer((1, 5, 7, 8), (5, 3), Window((1, 2), (2, 0), (1, 2))),
    "7x7": Layer((1, 3, 4, 5), (7, 7), Window(padding=(3, 3))),
    "dilated": Layer((2, 4, 9, 6), window=Window(padding=(2, 1), dilation=(2, 1))),
    "wider than the image": Layer((1, 3, 2, 2), window=Window(padding=(4, 3))),
    "two outputs a channel": Layer((1, 6, 5, 6), multiple=2),
    "1x1": Layer((3, 33, 2, 3), (1, 1), Window((2, 1))),
    "many channels": Layer((1, 130, 2, 3)),
    "large": Layer((1, 3, 4, 5), (5, 13), Window(padding=(2, 6))),
}

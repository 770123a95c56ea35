"""What the kernels of qconv2d and qlinear may cost: a few instructions more than they did at last.

The instructions are those of a pass of the loop over K. A tile of 128 x 128 x 128 takes 256 threads
of an A100 64 products, of 16 x 8 x 32 each, and of an H100 4, of 64 x 128 x 32.
"""

from dataclasses import replace

import torch
from machine_code import Budget, Case

LAST = torch.channels_last


def _images(packed, batch, channels, *size):
    shape = (batch, channels // 2 if packed else channels, *size)
    dtype = torch.uint8 if packed else torch.int8
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=LAST)


def _weight(four_bits, outputs, *shape):
    if not four_bits:
        return torch.empty(outputs, *shape, dtype=torch.int8, device="meta")
    length = -(-torch.Size(shape).numel() // 64) * 32
    return torch.empty(outputs, length, dtype=torch.uint8, device="meta")


def _conv(x, outputs, kernel, stride=1, groups=1, w4=False, x4=False, x_zero=0):
    """With bias and residual, ReLU, and int8 or packed output."""

    def call():
        from dfq_kernels._triton.qconv2d import qconv2d

        batch, channels, *size = x
        padding = kernel // 2
        out = [(n + 2 * padding - kernel) // stride + 1 for n in size]
        pairs = [[n] * 2 for n in (kernel, stride, padding, 1)]
        weight = _weight(w4, outputs, kernel, kernel, channels // groups)
        multiplier = torch.empty(outputs, device="meta")
        residual = _images(x4, batch, outputs, *out)
        grid = [-3, -8, 7, 1] if x4 else [-128, -128, 127]
        layer = (_images(x4, *x), weight, None, None, x_zero, *pairs, groups)
        qconv2d(*layer, multiplier, multiplier, residual, 0.3, 1, True, grid)

    return call


def _linear(rows, inputs, outputs, w4=False):
    def call():
        from dfq_kernels._triton.qlinear import qlinear

        x = torch.empty(rows, inputs, dtype=torch.int8, device="meta")
        multiplier = torch.empty(outputs, device="meta")
        weight = _weight(w4, outputs, inputs)
        qlinear(x, weight, None, None, 0, multiplier, None, None, 0.0, 0, False, [])

    return call


def _budget(registers, instructions, products, rounded, **others):
    return Budget(
        registers,
        instructions,
        products=products,
        rounded=rounded,
        exact=True,
        **{"loads": 0, "stores": 0, "narrow": 0, **others},
    )


DESCRIPTORS, POINTERS = "descriptors_kernel", "pointers_kernel"
DEEP, SHALLOW, EARLY = (64, 256, 14, 14), (64, 64, 56, 56), (64, 256, 28, 28)
HOPPER = [  # case, call, kernel, budget
    ("3x3", _conv(DEEP, 256, 3, x_zero=-128), DESCRIPTORS, _budget(124, 102, 4, 64)),
    ("3x3 of 64", _conv(SHALLOW, 64, 3), DESCRIPTORS, _budget(180, 98, 4, 128)),
    ("3x3/2", _conv(EARLY, 256, 3, 2), DESCRIPTORS, _budget(124, 108, 4, 64)),
    ("1x1", _conv(EARLY, 512, 1), DESCRIPTORS, _budget(204, 102, 8, 128)),
    ("3x3 w4", _conv(DEEP, 256, 3, w4=True), DESCRIPTORS, _budget(120, 140, 4, 64, shared=2)),
    ("3x3 w4a4", _conv(DEEP, 256, 3, w4=True, x4=True), DESCRIPTORS,
     _budget(228, 158, 4, 64, shared=8)),
    ("1x1 w8a4", _conv(EARLY, 512, 1, x4=True), DESCRIPTORS, _budget(228, 140, 4, 64, shared=8)),
    ("square", _linear(8192, 8192, 8192), DESCRIPTORS, _budget(204, 102, 8, 0)),
    ("few rows w4", _linear(8, 512, 1000, w4=True), DESCRIPTORS,
     _budget(56, 124, 4, 0, shared=2)),
    ("odd 3x3/2", _conv((64, 256, 15, 15), 256, 3, 2), POINTERS,
     _budget(80, 135, 8, 32, loads=10, shared=7)),
    ("grouped", _conv(EARLY, 256, 3, groups=32), POINTERS,
     _budget(128, 230, 2, 32, narrow=16, shared=16)),
    ("stem", _conv((64, 3, 224, 224), 64, 7, 2), "stem_kernel",
     _budget(160, 3000, 7, 64, loads=14, stores=4, narrow=84, shared=84)),
]  # fmt: skip
AMPERE = [
    ("3x3", _conv(DEEP, 256, 3, x_zero=-128), POINTERS,
     _budget(208, 180, 64, 64, loads=8, shared=27)),
    ("1x1", _conv(EARLY, 512, 1), POINTERS, _budget(172, 144, 64, 64, loads=8, shared=27)),
    ("3x3 w4", _conv(DEEP, 256, 3, w4=True), POINTERS,
     _budget(128, 214, 64, 64, loads=4, narrow=4, shared=37)),
    ("3x3 w4a4", _conv(DEEP, 256, 3, w4=True, x4=True), POINTERS,
     _budget(128, 405, 64, 64, narrow=8, shared=21)),
    ("stem", _conv((64, 3, 224, 224), 64, 7, 2), "stem_kernel",
     _budget(176, 2950, 112, 64, loads=14, stores=4, narrow=96, shared=98)),
]  # fmt: skip
CASES = [
    Case(f"{name} of sm_{sm}", call, {kernel: budget}, (sm,))
    for sm, lines in ((90, HOPPER), (80, AMPERE))
    for name, call, kernel, budget in lines
]
BORDER = Budget(40, 90, loads=2, stores=0, narrow=0)
CASES[0] = replace(CASES[0], budgets={**CASES[0].budgets, "border_kernel": BORDER})

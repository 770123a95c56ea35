"""What the kernels of depthwise may cost: a few instructions more than they did at last."""

import torch
from machine_code import Budget, Case


def _depthwise(size, channels, kernel=3, stride=1, batch=256, four_bits=False, grid=(0, -128, 127)):
    def call():
        from dfq_kernels._triton.depthwise import depthwise
        from dfq_kernels.packing import packed_size

        def empty(*shape, dtype=torch.int8):
            return torch.empty(shape, dtype=dtype, device="meta")

        x = empty(batch, size, size, channels).permute(0, 3, 1, 2)
        weight = empty(channels, kernel, kernel, 1)
        if four_bits:
            weight = empty(channels, packed_size(kernel**2), dtype=torch.uint8)
        terms = empty(channels, dtype=torch.float32), empty(channels, dtype=torch.float32)
        pairs = [kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1, 1]
        end = (None, 0.0, 0, True, grid)
        depthwise(x, weight, None, None, 3, *pairs, channels, *terms, *end)

    return call


def _budget(registers, instructions, narrow, outputs):
    """Of a tile: loads and stores of 4 neighbours (of 2 or 1, if filters are large)."""
    return Budget(registers, instructions, loads=0, stores=0, narrow=narrow, rounded=outputs)


CASES = [  # outputs of a thread, at 30 to 45 instructions each; 100 with 25 taps
    Case("depthwise 3x3", _depthwise(56, 128), {"blocks": _budget(144, 1115, 32, 32)}),
    Case("depthwise 3x3/2", _depthwise(112, 64, 3, 2), {"blocks": _budget(120, 770, 29, 16)}),
    Case("depthwise 5x5", _depthwise(28, 96, 5, four_bits=True),
         {"blocks": _budget(240, 940, 40, 8)}, (90,)),
    Case("depthwise 9x9", _depthwise(28, 96, 9), {"large": _budget(32, 48, 2, 1)}, (90,)),
]  # fmt: skip

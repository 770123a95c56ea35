"""What the kernels of quantize and requantize may cost: a few instructions more than at last."""

import torch
from machine_code import EVERY_ARCHITECTURE, Budget, Case

SHAPE = (64, 64, 56, 56)
LAST = torch.channels_last


def _quantize(dtype, shape=SHAPE, layout=torch.contiguous_format):
    def call():
        from dfq_kernels._triton.quantize import quantize

        x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
        scale, zero_point = torch.empty(2, 1, device="meta")
        quantize(x, scale, zero_point, 0, 255, 128)

    return call


def _requantize(*shape):
    def call():
        from dfq_kernels._triton.requantize import requantize

        requantize(torch.empty(shape, dtype=torch.int8, device="meta"), 0.3, 0.7, 0, 0, 0, 15)

    return call


def _budget(registers, instructions, rounded, **others):
    """Four loads of a thread; two more for the grid, and its division's multiply-adds."""
    defaults = {"loads": 4, "stores": rounded // 16, "narrow": 2, "fused": 16, "divided": 8}
    return Budget(registers, instructions, rounded=rounded, **{**defaults, **others})


FP32, BF16 = torch.float32, torch.bfloat16
IMAGES, SMALL = (64, 3, 224, 224), (64, 512, 7, 7)  # 3 of 4 channels; planes of any length
CASES = [
    Case("fp32 codes", _quantize(FP32, layout=LAST), {"rows": _budget(40, 265, 16)},
         EVERY_ARCHITECTURE),
    Case("bf16 codes", _quantize(BF16, layout=LAST), {"rows": _budget(40, 430, 32)}),
    Case("fp32 codes of planes", _quantize(FP32), {"planes": _budget(40, 460, 16, shared=20)}),
    Case("bf16 codes of planes", _quantize(BF16), {"planes": _budget(48, 565, 32, shared=8)}),
    Case("fp32 codes of 7x7", _quantize(FP32, SMALL),
         {"planes": _budget(48, 540, 16, loads=0, narrow=18, shared=12)}),
    Case("fp32 codes of images", _quantize(FP32, IMAGES),
         {"planes": _budget(64, 535, 16, stores=0, narrow=18, shared=20)}),
    Case("codes of codes", _requantize(*SHAPE), {"kernel": _budget(64, 870, 64, narrow=0)}),
    Case("odd codes of codes", _requantize(12_345_677), {"kernel": _budget(64, 910, 65)}, (90,)),
]  # fmt: skip

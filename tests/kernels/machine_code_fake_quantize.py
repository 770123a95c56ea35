"""What the kernels of fake_quantize may cost: a few instructions more than they did at last.

Elements of a thread: 16 (float32) or 32 forward, 8 or 16 backward; of bfloat16 flat, that is 14
instructions for each forward and 21 backward, where an H200 has time for 28 and 43 at the speed of
its memory.
"""

import torch
from machine_code import EVERY_ARCHITECTURE, Budget, Case

SHAPE = (64, 64, 56, 56)
SMALL_PLANES = (64, 512, 7, 7)
ODD = (12_345_677,)
HUGE = (2**31 + 2**20,)
WEIGHTS = [(64, 64, 3, 3)] * 16


def _arguments(dtype, axis, *, last=False, drop=0.0, shape=SHAPE):
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
    channels = 1 if axis is None else shape[axis]
    scale, zero_point = torch.empty(2, channels, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta") if drop else None
    return x, scale, zero_point, -8, 7, axis, drop, seed


def _forward(*args, **options):
    def call():
        from dfq_kernels._triton.fake_quantize import fake_quantize

        fake_quantize(*_arguments(*args, **options))

    return call


def _backward(*args, needs=(True, True, True), **options):
    def call():
        from dfq_kernels._triton.fake_quantize import fake_quantize_backward

        x, *rest = _arguments(*args, **options)
        fake_quantize_backward(torch.empty_like(x), x, *rest, *needs)

    return call


def _all(*, backward):
    def call():
        from dfq_kernels._triton import fake_quantize_all as ops

        xs = [torch.empty(shape, device="meta") for shape in WEIGHTS]
        scales = [torch.empty(x.shape[0], device="meta") for x in xs]
        lists = xs, scales, scales, [-8] * len(xs), [7] * len(xs)
        if backward:
            ops.fake_quantize_all_backward(xs, *lists, True, True, True)
        else:
            ops.fake_quantize_all(*lists)

    return call


def _budget(registers, instructions, rounded, **others):
    """Of a forward kernel without a loop: two loads for the grid, and its division's multiplies."""
    defaults = {"loads": 4, "stores": 4, "narrow": 2, "fused": 16, "divided": 8}
    return Budget(registers, instructions, rounded=rounded, **{**defaults, **others})


def _loop(registers, instructions, rounded, **others):
    """Of a backward loop: it holds nothing but what each element needs."""
    defaults = {"loads": 4, "stores": 2, "narrow": 0}
    return Budget(registers, instructions, rounded=rounded, **{**defaults, **others})


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SUMS = Budget(56, 100, loads=0, stores=0)
UNROLLED = {"narrow": 18, "fused": 56}  # a grid for each of 8 columns
FORWARD = [
    ("fp32", _forward(FP32, None), "rows", _budget(48, 280, 16)),
    ("bf16", _forward(BF16, None), "rows", _budget(48, 465, 32)),
    ("fp16", _forward(FP16, None), "rows", _budget(48, 450, 32)),
    ("bf16 odd", _forward(BF16, None, shape=ODD), "rows", _budget(48, 525, 33, narrow=4, fused=22)),
    ("bf16 huge", _forward(BF16, None, shape=HUGE), "rows", _budget(48, 465, 32)),
    ("fp32 drop", _forward(FP32, None, drop=0.5), "rows", _budget(64, 515, 16, narrow=3)),
    ("bf16 drop", _forward(BF16, None, drop=0.5), "rows", _budget(64, 950, 32, narrow=3)),
    ("fp32 planes", _forward(FP32, 1), "rows", _budget(48, 345, 16)),
    ("bf16 planes", _forward(BF16, 1), "rows", _budget(48, 505, 32)),
    ("fp32 last", _forward(FP32, 1, last=True), "columns", _loop(64, 208, 16, stores=4)),
    ("bf16 last", _forward(BF16, 1, last=True), "columns",
     _budget(80, 785, 32, loads=8, **UNROLLED)),
    ("bf16 small planes", _forward(BF16, 1, shape=SMALL_PLANES), "columns",
     _budget(80, 905, 32, **UNROLLED)),
]  # fmt: skip
BACKWARD = [
    ("fp32", _backward(FP32, None), "rows", _loop(56, 164, 8)),
    ("bf16", _backward(BF16, None), "rows", _loop(80, 350, 16)),
    ("bf16 odd", _backward(BF16, None, shape=ODD), "rows", _loop(80, 350, 17)),
    ("bf16 huge", _backward(BF16, None, shape=HUGE), "rows", _loop(104, 350, 16)),
    ("bf16 dx alone", _backward(BF16, None, needs=(True, False, False)), "rows",
     _loop(32, 235, 16)),
    ("bf16 dscale alone", _backward(BF16, None, needs=(False, True, False)), "rows",
     _loop(56, 285, 16, stores=0)),
    ("bf16 drop", _backward(BF16, None, drop=0.5), "rows", _loop(104, 625, 16, narrow=1)),
    ("fp32 planes", _backward(FP32, 1), "rows", _loop(56, 170, 8)),
    ("fp32 last", _backward(FP32, 1, last=True), "columns", _loop(80, 184, 8)),
    ("bf16 last", _backward(BF16, 1, last=True), "columns", _loop(128, 370, 16)),
    ("bf16 small planes", _backward(BF16, 1, shape=SMALL_PLANES), "columns",
     _budget(80, 1195, 16, stores=2, shared=48, **UNROLLED)),
]  # fmt: skip


def _case(direction, name, call, kernel, budget):
    budgets = {f"{kernel}_{direction}": budget}
    if name == "bf16" and direction == "backward":
        budgets["finish_backward"] = SUMS
    return Case(f"{name} {direction}", call, budgets, ARCHITECTURES.get(name, (80, 90)))


HOPPER_ALONE = ("fp16", "bf16 odd", "bf16 huge", "bf16 dx alone", "bf16 dscale alone")
ARCHITECTURES = {"fp32": EVERY_ARCHITECTURE, "bf16": EVERY_ARCHITECTURE}
ARCHITECTURES |= dict.fromkeys(HOPPER_ALONE, (90,))
CASES = [_case("forward", *line) for line in FORWARD]
CASES += [_case("backward", *line) for line in BACKWARD]
CASES += [
    Case("fp32 weights forward", _all(backward=False), {
        "rows_forward_all": _budget(48, 785, 16, narrow=8, fused=32),
    }),
    Case("fp32 weights backward", _all(backward=True), {
        "rows_backward_all": _budget(48, 1180, 8, stores=2, narrow=6, fused=22, shared=16),
        "finish_backward_all": Budget(64, 150, loads=8, stores=0),
    }),
]  # fmt: skip

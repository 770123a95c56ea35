"""What the kernels of batch_norm may cost.

A pass of the loop takes 4 elements of a thread in float32 and 8 in 16 bits. In less than 128
registers four programs of 128 threads run at once, as batch_norm_tiles plans.
"""

from collections.abc import Callable

import torch
from machine_code import EVERY_ARCHITECTURE, Budget, Case

EPS = 1e-5
FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16


def _x(dtype, shape, memory_format=torch.contiguous_format):
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)


def _channels(x, count):
    return torch.empty(count, x.shape[1], device="meta")


def _forward(*of_x) -> Callable[[], object]:
    def call():
        from dfq_kernels._triton.batch_norm import batch_norm

        x = _x(*of_x)
        batch_norm(x, *_channels(x, 4), EPS, True)

    return call


def _statistics(*of_x) -> Callable[[], object]:
    def call():
        from dfq_kernels._triton.batch_norm import batch_norm_statistics

        x = _x(*of_x)
        batch_norm_statistics(x, _channels(x, 1)[0])

    return call


def _backward(*of_x, statistics=True, relu=True, learns=True) -> Callable[[], object]:
    def call():
        from dfq_kernels._triton.batch_norm import batch_norm_backward

        x = _x(*of_x)
        grads = _channels(x, 2) if statistics else (None, None)
        values = (*grads, x, *_channels(x, 5), EPS, relu, learns)
        batch_norm_backward(torch.empty_like(x), *values)

    return call


def _statistics_backward(*of_x) -> Callable[[], object]:
    def call():
        from dfq_kernels._triton.batch_norm import batch_norm_statistics_backward

        x = _x(*of_x)
        grad_mean, grad_var, mean = _channels(x, 3)
        batch_norm_statistics_backward(grad_mean, grad_var, x, mean)

    return call


def _strided(dtype, backward):
    def call():
        from dfq_kernels._triton.batch_norm import batch_norm, batch_norm_backward

        x = _x(dtype, (64, 32, 56, 56))[:, :, ::2, ::2]
        values = _channels(x, 5)
        if backward:
            batch_norm_backward(x, None, None, x, *values, EPS, True, True)
        else:
            batch_norm(x, *values[:4], EPS, True)

    return call


def _of_x(kernel, registers, instructions, loads, stores, **others):
    """Of a pass over x: in its loop nothing but loads, stores and arithmetic of float32."""
    budget = Budget(registers, instructions, loads, stores, **{"narrow": 0, **others})
    return {f"{kernel}_kernel": budget}


IMAGES = ((64, 64, 56, 56), torch.channels_last)
PLANES = ((64, 64, 56, 56),)
SHORT = ((64, 512, 7, 7),)
OF_CHANNELS = Budget(160, 700, loads=0, stores=0, fused=8)
FORWARD = [
    ("float32 channels", _forward(FLOAT, *IMAGES), (80, 67, 1, 1)),
    ("bfloat16 channels", _forward(BFLOAT, *IMAGES), (120, 120, 1, 1)),
    ("float32 planes", _forward(FLOAT, *PLANES), (80, 108, 1, 1)),
    ("float16 planes", _forward(HALF, *PLANES), (112, 157, 1, 1)),
    ("bfloat16 short planes", _forward(BFLOAT, *SHORT), (120, 120, 1, 1)),
    ("bfloat16 statistics", _statistics(BFLOAT, *IMAGES), (80, 80, 1, 0)),
]
BACKWARD = [
    ("float32 channels", _backward(FLOAT, *IMAGES), (80, 89, 2, 1)),
    ("bfloat16 channels", _backward(BFLOAT, *IMAGES), (128, 174, 2, 1)),
    ("float32 planes", _backward(FLOAT, *PLANES), (80, 132, 2, 1)),
    ("float16 planes, nothing learned", _backward(HALF, *PLANES, learns=False), (96, 183, 2, 1)),
    ("bfloat16 short planes", _backward(BFLOAT, *SHORT), (128, 174, 2, 1)),
    ("bfloat16 statistics", _statistics_backward(BFLOAT, *PLANES), (56, 110, 1, 1)),
]


def _cases():
    for direction, cases in (("forward", FORWARD), ("backward", BACKWARD)):
        for name, call, costs in cases:
            architectures = EVERY_ARCHITECTURE if name == "float32 channels" else (80, 90)
            yield Case(f"{name} {direction}", call, _of_x(direction, *costs), architectures)
    call = _strided(FLOAT, backward=False)
    budgets = _of_x("forward", 80, 175, 0, 1, narrow=4)
    yield Case("strided forward", call, {**budgets, "merge_statistics_kernel": OF_CHANNELS})
    call = _strided(FLOAT, backward=True)
    budgets = _of_x("backward", 72, 206, 0, 1, narrow=8)
    yield Case("strided backward", call, {**budgets, "merge_gradients_kernel": OF_CHANNELS})


CASES = [*_cases()]

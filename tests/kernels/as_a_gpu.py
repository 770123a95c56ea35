"""Pytest plugin, ``-p tests.kernels.as_a_gpu``: Triton's interpreter rounds as a GPU does.

For runs that do not pass through conftest.py: the dry run of bench/gpu_day.py.
"""

import functools
import importlib.util

import numpy as np
import torch


@functools.cache
def round_bfloat16_as_a_gpu() -> None:
    """Triton's interpreter cuts float32 off to bfloat16; a GPU rounds it to the nearest."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.tensor(src.data).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        return original(self, src, dst_type)

    builder.cast_impl = cast_impl


def pytest_configure() -> None:
    """Before any kernel is interpreted."""
    if importlib.util.find_spec("triton"):
        round_bfloat16_as_a_gpu()

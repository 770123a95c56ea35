"""Runs a test on every backend: fixture ``backend``. Triton runs in its interpreter, on the CPU."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import cuda_emulation
import numpy as np
import pytest
import torch

from dfq_kernels import _backend

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported


@functools.cache
def _round_bfloat16_as_a_gpu() -> None:
    """Triton's interpreter cuts float32 off to bfloat16, and loses digits of denormals."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    original = builder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.tensor(src.data).bfloat16().view(torch.int16)
            return interpreter.TensorHandle(rounded.numpy().view(np.uint16), tl.bfloat16)
        if src.dtype.scalar == tl.bfloat16 and dst_type.scalar == tl.float32:
            bits = src.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), tl.float32)
        return original(self, src, dst_type)

    builder.cast_impl = cast_impl


@functools.cache
def _patch_once_a_launch() -> None:
    """The interpreter patches triton.language again for each call of a function: half its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    # nor does a GPU check each sum of integers for an overflow: two thirds of the time
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(fn):
        values = list(fn.__globals__.values())
        modules = (any(v is tl for v in values), any(v is tl.core for v in values))
        if modules in patched:
            return interpreter._LangPatchScope()
        patched.add(modules)
        return patch(fn)

    def launch_unpatched(*args, **kwargs):
        patched.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_unpatched


@contextmanager
def _force(name: str) -> Iterator[None]:
    if name == "compiled" and not _backend._load_library("cpu"):
        pytest.skip("the compiled kernels are not in this install")
    if name == "triton":
        if not (_backend._exists("triton") and os.environ.get("TRITON_INTERPRET")):
            pytest.skip("the Triton interpreter is not in this install")
        _round_bfloat16_as_a_gpu()
        _patch_once_a_launch()
    with _backend.use(name):
        yield


# For each name a context in which the public functions take that backend on CPU tensors.
BACKENDS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "compiled": lambda: _force("compiled"),
    "triton": lambda: _force("triton"),
    "cuda": cuda_emulation.use,
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """In force during the test; ``_backend.implementation(op, "cpu")`` is its function."""
    with BACKENDS[request.param]():
        yield request.param

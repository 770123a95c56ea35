"""Runs a test on every backend: fixture ``backend``. Triton runs in its interpreter, on the CPU."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from dfq_kernels import _backend

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported


@contextmanager
def _force(name: str) -> Iterator[None]:
    if name == "compiled" and not _backend._load_library("cpu"):
        pytest.skip("the compiled kernels are not in this install")
    if name == "triton" and not (_backend._exists("triton") and "TRITON_INTERPRET" in os.environ):
        pytest.skip("the Triton interpreter is not in this install")
    with _backend.use(name):
        yield


# For each name a context in which the public functions take that backend on CPU tensors.
BACKENDS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "compiled": lambda: _force("compiled"),
    "triton": lambda: _force("triton"),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """In force during the test; ``_backend.implementation(op, "cpu")`` is its function."""
    with BACKENDS[request.param]():
        yield request.param

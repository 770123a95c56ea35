"""Which implementation of an op runs, and why the others do not.

The file system is the registry. Op ``fake_quantize_backward`` has

    compiled    torch.ops.dfq_C.fake_quantize_backward, from _C_cpu.so or _C_cuda.so
    triton      dfq_kernels/_triton/fake_quantize.py: fake_quantize_backward
    reference   dfq_kernels/fake_quantize.py: fake_quantize_backward_reference

An absent backend is skipped, a broken one raises. ``DFQ_BACKEND`` forces one; if that one is
missing it is an error and never a silent fallback. ``DFQ_ISA=v3`` or ``v1`` keeps the compiled CPU
ops from AVX-512, or from everything that not every x86-64 has. Both are read when an op first runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("compiled", "triton", "reference")
ORDER = {"cpu": ("compiled", "reference"), "cuda": ("compiled", "triton", "reference")}
LIBRARIES = {"cpu": "_C_cpu.so", "cuda": "_C_cuda.so"}
REMEDY = {
    "compiled": "Compile it with `python -m dfq_kernels.build` in a source checkout",
    "triton": "Install triton and use a CUDA tensor",
    "reference": "Install dfq_kernels whole",
}

# CUDA ops that ran on a GPU, with their record in bench/results; others run only when forced.
PROVEN_ON_CUDA: frozenset[str] = frozenset()

_forced: str | None = None


@dataclass(frozen=True)
class Status:
    """Whether a backend can run here; if not, ``reason`` is one sentence that says why."""

    backend: str
    device: str
    available: bool
    reason: str


@functools.cache
def implementation(op: str, device: str) -> Callable[..., Any]:
    """The function that runs ``op`` on tensors of ``device`` ("cpu" or "cuda").

    Raises:
        ValueError: if ``DFQ_BACKEND`` names no backend.
        RuntimeError: if ``DFQ_BACKEND`` names one that lacks ``op`` here.
    """
    forced = _forced or os.environ.get("DFQ_BACKEND")
    if forced and forced not in BACKENDS:
        raise ValueError(
            f"DFQ_BACKEND={forced!r} is no backend; choose one of {', '.join(BACKENDS)}."
        )
    if forced:
        function = variant(op, forced, device)
        if function is None:
            raise RuntimeError(
                f"DFQ_BACKEND={forced} has no {op!r} for {device} tensors in this install. "
                f"{REMEDY[forced]}, or unset DFQ_BACKEND."
            )
        return function
    candidates = (variant(op, backend, device) for backend in _order(op, device))
    return next(function for function in candidates if function is not None)


def variant(op: str, backend: str, device: str) -> Callable[..., Any] | None:
    """``op`` as ``backend`` implements it for ``device``, or ``None`` if this install lacks it."""
    if backend == "compiled":
        return _compiled(op, device) if _load_library(device) else None
    if backend == "triton":
        return _triton(op) if device == "cuda" or os.environ.get("TRITON_INTERPRET") else None
    return _from_module("dfq_kernels", op, f"{op}_reference")


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Force ``backend`` for every op within the block."""
    global _forced
    previous, _forced = _forced, backend
    implementation.cache_clear()
    try:
        yield
    finally:
        _forced = previous
        implementation.cache_clear()


def report() -> list[Status]:
    """Every backend on every device: whether it can run here, and if not, why."""
    return [
        Status(backend, device, reason == "", reason)
        for device, order in ORDER.items()
        for backend in order
        for reason in [_why_not(backend, device)]
    ]


def _order(op: str, device: str) -> tuple[str, ...]:
    if device == "cuda" and op not in PROVEN_ON_CUDA:
        return tuple(backend for backend in ORDER[device] if backend != "compiled")
    return ORDER[device]


def _why_not(backend: str, device: str) -> str:
    if device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device."
    if backend == "compiled":
        name = LIBRARIES[device]
        for needed in (LIBRARIES["cpu"], name):
            if not _library_path(device).with_name(needed).exists():
                return f"dfq_kernels/{needed} is not there. {REMEDY[backend]}."
        try:
            _load_library(device)
        except RuntimeError as error:
            return str(error)
        if device == "cuda" and not PROVEN_ON_CUDA:
            return "no GPU has proven it yet; DFQ_BACKEND=compiled runs it all the same."
    if backend == "triton":
        if not _exists("triton"):
            return "triton is not installed. Install it with `pip install triton`."
        if not _exists("dfq_kernels._triton"):
            return "this version of dfq_kernels has no Triton kernels."
    return ""


def _library_path(device: str) -> Path:
    return Path(__file__).with_name(LIBRARIES[device])


@functools.cache
def _load_library(device: str) -> bool:
    """Load the compiled ops; False if they are not there.

    Raises:
        RuntimeError: if they are there and do not load.
    """
    path = _library_path(device)
    if not path.exists():
        return False
    if device == "cuda" and not (torch.cuda.is_available() and _load_library("cpu")):
        return False  # the ops are defined in _C_cpu
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise RuntimeError(
            f"{path.name} does not load ({error}). Compile it again with "
            "`python -m dfq_kernels.build`, or delete it."
        ) from error
    return True


def _compiled(op: str, device: str) -> Callable[..., Any] | None:
    function = getattr(torch.ops.dfq_C, op, None)
    # _C_cpu defines every op, also those for which there are no CUDA kernels
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return function if function and has_kernel(f"dfq_C::{op}", device.upper()) else None


def _triton(op: str) -> Callable[..., Any] | None:
    return _from_module("dfq_kernels._triton", op, op) if _exists("triton") else None


def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _from_module(package: str, op: str, name: str) -> Callable[..., Any] | None:
    """``name`` from the module of ``package`` whose stem begins ``op``, the longest first."""
    if not _exists(package):
        return None
    words = op.split("_")
    for length in range(len(words), 0, -1):
        module = f"{package}.{'_'.join(words[:length])}"
        if _exists(module):
            return getattr(importlib.import_module(module), name, None)
    return None

"""csrc/cuda on a CPU: the same sources, compiled as C++ against cuda_emulation.h.

The ops are those of ``torch.ops.dfq_emulated``. They raise where a GPU would fault or hang: 16-byte
accesses at other addresses, threads that wait for others which never come.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from dfq_kernels import _backend
from dfq_kernels._compile import cxx

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CACHE = ROOT / "build" / "cuda_emulation"
SOURCES = [*sorted(ROOT.glob("csrc/cuda/*.c*")), *sorted(HERE.glob("*.cpp"))]
HEADERS = [*ROOT.glob("csrc/core/*.h"), *ROOT.glob("csrc/cuda/*.h"), *HERE.glob("*.h")]
FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas"),
    *("-DDFQ_EMULATE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-U_FORTIFY_SOURCE"),
]
_LIBRARIES: list[torch.library.Library] = []  # ops are registered for as long as theirs lives
SANITIZE = os.environ.get("DFQ_EMULATE_SANITIZE", "")  # "address", with libasan preloaded


@contextmanager
def use() -> Iterator[None]:
    """Within the block the public functions run the emulated CUDA kernels on CPU tensors."""
    if not cxx() or not _backend._load_library("cpu"):
        pytest.skip("the emulation needs a C++ compiler and the compiled kernels")
    load()
    variant = _backend.variant

    def emulated(op, backend, device):
        if (backend, device) == ("compiled", "cpu"):
            return getattr(torch.ops.dfq_emulated, op, None)
        return variant(op, backend, device)

    _backend.variant = emulated
    try:
        with _backend.use("compiled"):
            yield
    finally:
        _backend.variant = variant


@contextmanager
def backwards() -> Iterator[None]:
    """Within the block threads and blocks run from the last to the first."""
    load().dfq_emulate_backwards(1)
    try:
        yield
    finally:
        load().dfq_emulate_backwards(0)


@contextmanager
def architecture(value: int) -> Iterator[None]:
    """Within the block kernels do as on a GPU of that compute capability times ten: 75 or 90."""
    load().dfq_emulate_architecture(value)
    try:
        yield
    finally:
        load().dfq_emulate_architecture(80)


@functools.cache
def load() -> ctypes.CDLL:
    """The compiled emulation, with its ops registered."""
    path = compile_emulation()
    assert _backend._load_library("cpu"), "the schemas are in _C_cpu.so"
    library = torch.library.Library("dfq_emulated", "DEF")
    _LIBRARIES.append(library)
    for op in _ops():
        schema = str(getattr(torch.ops.dfq_C, op).default._schema)
        library.define(schema.removeprefix("dfq_C::"))
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def compile_emulation() -> Path:
    """Compile csrc/cuda and the emulation, unless the cache holds what they would give."""
    installed = Path(torch.__file__).parent
    flags = [*FLAGS, *([f"-fsanitize={SANITIZE}", "-g"] if SANITIZE else [])]
    command = [
        *cxx(),
        *flags,
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'csrc/cuda'}",
        f"-I{HERE}",
        f"-isystem{installed / 'include'}",
    ]
    digest = hashlib.sha256(" ".join([*command, torch.__version__]).encode())
    for path in sorted([Path(__file__), *SOURCES, *HEADERS]):
        digest.update(path.read_bytes())
    folder = CACHE / digest.hexdigest()[:16]
    library = folder / "emulation.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.name}.{os.getpid()}.o" for source in SOURCES]

    def compile_one(source: Path, output: Path) -> None:
        _call([*command, "-x", "c++", "-c", str(source), "-o", str(output)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, SOURCES, objects))
    fresh = folder / f"emulation.{os.getpid()}.so"
    link = [f"-L{installed / 'lib'}", "-ltorch_cpu", "-ltorch", "-o", str(fresh)]
    _call([*command, "-shared", *map(str, objects), *link])
    fresh.replace(library)
    for path in objects:
        path.unlink()
    return library


def _ops() -> list[str]:
    texts = (path.read_text() for path in ROOT.glob("csrc/cuda/*.cpp"))
    return sorted({op for text in texts for op in re.findall(r'm\.impl\("(\w+)"', text)})


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]

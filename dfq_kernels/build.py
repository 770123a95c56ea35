"""Compile ``csrc`` in place: ``python -m dfq_kernels.build`` in a source checkout.

What it makes, next to this file:

    _C_cpu.so           csrc/cpu/*.cpp, against LibTorch's stable ABI: for torch 2.10 and later
    _C_cuda.so          csrc/cuda/*.cu and *.cpp, likewise; any torch will do, it needs no GPU
    _arithmetic*.so     csrc/python/arithmetic.cpp, pybind11: csrc/core for the tests

``setup.py`` calls the same functions. What cannot be compiled is skipped, and the reason said.
ninja is used if there is one. Importing this module imports no torch and runs nothing.

Environment:
    CXX: the C++ compiler; otherwise the first of c++, g++, clang++.
    CXXFLAGS: more flags for it, last on the command line.
    CUDACXX: nvcc; otherwise that of CUDA_HOME or CUDA_PATH, or on the PATH.
    TORCH_CUDA_ARCH_LIST: the GPUs to compile for, e.g. "8.0;9.0+PTX".
    DFQ_BUILD_CPP: 0 compiles nothing.
    DFQ_BUILD_CUDA: 0 compiles no CUDA.
    MAX_JOBS: how many files ninja compiles at once.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

from ._compile import ARITHMETIC, Library, compile_library, cxx, nvcc

__all__ = ["ARITHMETIC", "ROOT", "Library", "compile_library", "main", "plan"]

ROOT = Path(__file__).resolve().parents[1]
OLDEST_TORCH = (2, 10)
CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0+PTX"


def plan(root: Path = ROOT) -> tuple[list[Library], dict[str, str]]:
    """The libraries that can be compiled here, and the reason for each that cannot."""
    libraries, skipped = [], {}
    describe = {
        "_C_cpu": _cpu_library,
        "_C_cuda": _cuda_library,
        "_arithmetic": _arithmetic_module,
    }
    for name in describe:
        described = _obstacle(root) or describe[name](root)
        if isinstance(described, str):
            skipped[name] = described
        else:
            libraries.append(described)
    return libraries, skipped


def main() -> int:
    """Compile everything in place, say what was done, and return 1 if nothing was."""
    libraries, skipped = plan()
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    for library in libraries:
        output = ROOT / "dfq_kernels" / library.filename
        compile_library(library, output, ROOT / "build" / "native", ROOT)
        print(f"compiled {output}")
    return 0 if libraries else 1


def _obstacle(root: Path) -> str | None:
    if os.environ.get("DFQ_BUILD_CPP", "1") == "0":
        return "DFQ_BUILD_CPP=0; unset it and run `python -m dfq_kernels.build`."
    if not (root / "csrc").is_dir():
        return f"there is no csrc in {root}; run it in a source checkout."
    if not cxx():
        return "no C++ compiler was found; install g++ or set CXX."
    return None


def _torch() -> Path | str:
    """The folder of the installed torch, or why it will not do."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return (
            "torch is not installed where the build runs; install it and use "
            "`pip install --no-build-isolation .` or `python -m dfq_kernels.build`."
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {version} is too old for the stable ABI; install torch 2.10 or later."
    return Path(next(iter(spec.submodule_search_locations)))


def _stable_abi(torch: Path) -> tuple[str, ...]:
    version = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    return (version, "-Icsrc", f"-isystem{torch / 'include'}")


def _cpu_library(root: Path) -> Library | str:
    sources = _files(root, "csrc/cpu/*.cpp")
    if not sources:
        return "csrc/cpu holds no sources."
    torch = _torch()
    if isinstance(torch, str):
        return torch
    return Library(
        name="_C_cpu",
        filename="_C_cpu.so",
        sources=sources,
        compile_flags=_stable_abi(torch),
        link_flags=(f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch"),
    )


def _cuda_library(root: Path) -> Library | str:
    sources = (*_files(root, "csrc/cuda/*.cu"), *_files(root, "csrc/cuda/*.cpp"))
    if not sources:
        return "csrc/cuda holds no sources."
    if os.environ.get("DFQ_BUILD_CUDA", "auto") == "0":
        return "DFQ_BUILD_CUDA=0; unset it and run `python -m dfq_kernels.build`."
    if not nvcc():
        return "nvcc was not found; install the CUDA toolkit, or set CUDACXX or CUDA_HOME."
    torch = _torch()
    if isinstance(torch, str):
        return torch
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
    targets = _targets(architectures)
    if targets is None:
        return f"TORCH_CUDA_ARCH_LIST={architectures!r} is no list such as '8.0;9.0+PTX'."
    missing = not (torch / "lib" / "libtorch_cuda.so").exists()
    needed = ("-Xlinker", "--no-as-needed", "-ltorch_cpu", "-ltorch_cuda", "-ltorch")
    return Library(
        name="_C_cuda",
        filename="_C_cuda.so",
        sources=sources,
        compile_flags=(*_stable_abi(torch), "-DUSE_CUDA"),
        link_flags=("--cudart=static", f"-L{torch / 'lib'}", *needed),
        cuda_flags=("-Icsrc", *targets),
        stubs=("libtorch_cuda.so",) if missing else (),
    )


def _targets(architectures: str) -> list[str] | None:
    """Flags of nvcc for a list as PyTorch writes it: machine code, and PTX where asked.

    GPUs of one generation are compiled from the PTX of the first of them, which takes less time.
    """
    names: dict[int, list[str]] = {}
    flags = []
    for one in re.split(r"[;,\s]+", architectures.strip()):
        found = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", one)
        if not found:
            return None
        name = found[1] + found[2]
        names.setdefault(int(found[1]), []).append(name)
        if found[3]:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    for same in names.values():
        plain = [name for name in same if name.isdigit()]
        codes = {min(plain): plain} if plain else {}
        codes |= {name: [name] for name in same if not name.isdigit()}
        flags += [
            f"-gencode=arch=compute_{first},code=[{','.join(f'sm_{name}' for name in group)}]"
            for first, group in codes.items()
        ]
    return flags


def _arithmetic_module(root: Path) -> Library | str:
    sources = _files(root, "csrc/python/arithmetic.cpp")
    if not sources:
        return "csrc/python holds no arithmetic.cpp."
    spec = importlib.util.find_spec("pybind11")
    if spec is None or not spec.submodule_search_locations:
        return "pybind11 is not installed; only the tests need it."
    includes = Path(next(iter(spec.submodule_search_locations))) / "include"
    return Library(
        name="_arithmetic",
        filename=f"_arithmetic{sysconfig.get_config_var('EXT_SUFFIX')}",
        sources=sources,
        compile_flags=(
            "-Icsrc",
            f"-isystem{includes}",
            f"-isystem{sysconfig.get_paths()['include']}",
        ),
    )


def _files(root: Path, pattern: str) -> tuple[str, ...]:
    return tuple(sorted(path.relative_to(root).as_posix() for path in root.glob(pattern)))


if __name__ == "__main__":
    sys.exit(main())

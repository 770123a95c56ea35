"""Compile ``csrc`` in place: ``python -m dfq_kernels.build`` in a source checkout.

What it makes, next to this file:

    _C_cpu.so           csrc/cpu/*.cpp, against LibTorch's stable ABI: for torch 2.10 and later
    _arithmetic*.so     csrc/python/arithmetic.cpp, pybind11: csrc/core for the tests

``setup.py`` calls the same functions. What cannot be compiled is skipped, and the reason said.
ninja is used if there is one. Importing this module imports no torch and runs nothing.

Environment:
    CXX: the C++ compiler; otherwise the first of c++, g++, clang++.
    CXXFLAGS: more flags, last on the command line.
    DFQ_BUILD_CPP: 0 compiles nothing.
    MAX_JOBS: how many files ninja compiles at once.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST_TORCH = (2, 10)
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi")
# One rounding a product on every backend. The other two only permit vectors where a math
# function could set errno or a comparison could trap; they change no result.
ARITHMETIC = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")


@dataclass(frozen=True)
class Library:
    """One shared library, ``dfq_kernels.<name>``; paths and commands are relative to the root."""

    name: str
    filename: str
    sources: tuple[str, ...]
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...] = ()


def plan(root: Path = ROOT) -> tuple[list[Library], dict[str, str]]:
    """The libraries that can be compiled here, and the reason for each that cannot."""
    libraries, skipped = [], {}
    for name, describe in (("_C_cpu", _cpu_library), ("_arithmetic", _arithmetic_module)):
        reason = _obstacle(root)
        described = reason or describe(root)
        if isinstance(described, str):
            skipped[name] = described
        else:
            libraries.append(described)
    return libraries, skipped


def compile_library(library: Library, output: Path, build_dir: Path, root: Path = ROOT) -> None:
    """Compile and link ``library`` to ``output``; objects are kept in ``build_dir``.

    Raises:
        RuntimeError: if the compiler or the linker fails; it has printed why.
    """
    build_dir.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    linked = build_dir / library.filename
    ninja = shutil.which("ninja")
    if ninja:
        script = build_dir / f"{library.name}.ninja"
        script.write_text(_ninja_script(library, linked, build_dir, root))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        _call([ninja, "-f", str(script), *jobs], root)
    else:
        for source in library.sources:
            _call(_compile_command(library, root / source, _object(build_dir, source)), root)
        _call(_link_command(library, linked, build_dir), root)
    # renamed into place: a process that has the old library open keeps it whole
    fresh = output.with_name(f".{output.name}.new")
    shutil.copyfile(linked, fresh)
    fresh.replace(output)


def main() -> int:
    """Compile everything in place, say what was done, and return 1 if nothing was."""
    libraries, skipped = plan()
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}")
    for library in libraries:
        output = ROOT / "dfq_kernels" / library.filename
        compile_library(library, output, ROOT / "build" / "native")
        print(f"compiled {output}")
    return 0 if libraries else 1


def _obstacle(root: Path) -> str | None:
    if os.environ.get("DFQ_BUILD_CPP", "1") == "0":
        return "DFQ_BUILD_CPP=0; unset it and run `python -m dfq_kernels.build`."
    if not (root / "csrc").is_dir():
        return f"there is no csrc in {root}; run it in a source checkout."
    if not _compiler():
        return "no C++ compiler was found; install g++ or set CXX."
    return None


def _compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return [found] if found else []


def _cpu_library(root: Path) -> Library | str:
    sources = _files(root, "csrc/cpu/*.cpp")
    if not sources:
        return "csrc/cpu holds no sources."
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return (
            "torch is not installed where the build runs; install it and use "
            "`pip install --no-build-isolation .` or `python -m dfq_kernels.build`."
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        return f"torch {version} is too old for the stable ABI; install torch 2.10 or later."
    torch_dir = Path(next(iter(spec.submodule_search_locations)))
    return Library(
        name="_C_cpu",
        filename="_C_cpu.so",
        sources=sources,
        compile_flags=(
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-Icsrc",
            f"-isystem{torch_dir / 'include'}",
        ),
        link_flags=(f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-ltorch"),
    )


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


def _object(build_dir: Path, source: str) -> Path:
    return build_dir / (source.replace("/", "_") + ".o")


def _compile_command(library: Library, source: Path, output: Path) -> list[str]:
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    flags = [*FLAGS, *ARITHMETIC, *library.compile_flags, *extra]
    return [*_compiler(), *flags, "-c", str(source), "-o", str(output)]


def _link_command(library: Library, output: Path, build_dir: Path) -> list[str]:
    objects = [str(_object(build_dir, source)) for source in library.sources]
    return [*_compiler(), "-shared", *objects, *library.link_flags, "-o", str(output)]


def _ninja_script(library: Library, output: Path, build_dir: Path, root: Path) -> str:
    lines = ["ninja_required_version = 1.3", f"builddir = {_ninja_path(build_dir)}"]
    lines += ["rule link", "  command = $command", "  description = $out"]
    lines += ["rule compile", "  command = $command", "  description = $out"]
    lines += ["  depfile = $depfile", "  deps = gcc"]  # the headers that each source includes
    for source in library.sources:
        target = _object(build_dir, source)
        depfile = f"{target}.d"
        command = [*_compile_command(library, root / source, target), "-MMD", "-MF", depfile]
        lines += [f"build {_ninja_path(target)}: compile {_ninja_path(root / source)}"]
        lines += [f"  command = {shlex.join(command)}".replace("$", "$$")]
        lines += [f"  depfile = {depfile}".replace("$", "$$")]
    objects = " ".join(_ninja_path(_object(build_dir, source)) for source in library.sources)
    link = shlex.join(_link_command(library, output, build_dir)).replace("$", "$$")
    lines += [f"build {_ninja_path(output)}: link {objects}", f"  command = {link}"]
    return "\n".join(lines) + "\n"


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _call(command: Sequence[str], root: Path) -> None:
    done = subprocess.run(command, cwd=root, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{Path(command[0]).name} failed with exit code {done.returncode}; its message is "
            "above. DFQ_BUILD_CPP=0 installs without compiled kernels."
        )


if __name__ == "__main__":
    sys.exit(main())

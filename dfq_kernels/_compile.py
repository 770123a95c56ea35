"""Drives the C++ compiler and nvcc: with ninja if there is one, else file by file.

Importing this module imports no torch and runs nothing.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi")
# One rounding a product on every backend. The other two only permit vectors where a math
# function could set errno or a comparison could trap; they change no result.
ARITHMETIC = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
NVCC_FLAGS = (
    *("-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"),
    *("-Werror", "all-warnings", "-Xptxas", "-warn-spills"),
)


@dataclass(frozen=True)
class Library:
    """One shared library, ``dfq_kernels.<name>``; paths and commands are relative to the root.

    nvcc compiles what ends in .cu, and links if there is any. ``stubs`` are libraries to link
    against that this machine may lack, and that are loaded long before this one.
    """

    name: str
    filename: str
    sources: tuple[str, ...]
    compile_flags: tuple[str, ...]
    link_flags: tuple[str, ...] = ()
    cuda_flags: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()

    @property
    def uses_nvcc(self) -> bool:
        """Whether any of the sources is CUDA."""
        return any(source.endswith(".cu") for source in self.sources)


def cxx() -> list[str]:
    """The command of the C++ compiler, or nothing."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    return [found] if found else []


def nvcc() -> list[str]:
    """The command of nvcc, or nothing."""
    if os.environ.get("CUDACXX"):
        return shlex.split(os.environ["CUDACXX"])
    homes = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    candidates = [*(str(Path(home) / "bin" / "nvcc") for home in homes if home), "nvcc"]
    found = next(filter(None, map(shutil.which, candidates)), None)
    return [found] if found else []


def compile_library(library: Library, output: Path, build_dir: Path, root: Path) -> None:
    """Compile and link ``library`` to ``output``; objects are kept in ``build_dir``.

    Raises:
        RuntimeError: if a compiler or the linker fails; it has printed why.
    """
    build_dir.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    linked = build_dir / library.filename
    for stub in library.stubs:
        _call(_stub_command(stub, build_dir), root)
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


def _object(build_dir: Path, source: str) -> Path:
    return build_dir / (source.replace("/", "_") + ".o")


def _compile_command(library: Library, source: Path, output: Path) -> list[str]:
    if source.suffix == ".cu":
        command = [*nvcc(), *NVCC_FLAGS, *library.cuda_flags, *_host_compiler()]
    else:
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        command = [*cxx(), *FLAGS, *ARITHMETIC, *library.compile_flags, *extra]
    return [*command, "-c", str(source), "-o", str(output)]


def _link_command(library: Library, output: Path, build_dir: Path) -> list[str]:
    objects = [str(_object(build_dir, source)) for source in library.sources]
    linker = [*nvcc(), *_host_compiler()] if library.uses_nvcc else cxx()
    stubs = [f"-L{_stub_dir(build_dir)}"] if library.stubs else []
    return [*linker, "-shared", *objects, *stubs, *library.link_flags, "-o", str(output)]


def _host_compiler() -> list[str]:
    return ["-ccbin", cxx()[-1]] if os.environ.get("CXX") else []


def _stub_dir(build_dir: Path) -> Path:
    return build_dir / "stubs"


def _stub_command(name: str, build_dir: Path) -> list[str]:
    """Links an empty library of that name, so that the real one is looked for at load time."""
    _stub_dir(build_dir).mkdir(exist_ok=True)
    output = str(_stub_dir(build_dir) / name)
    return [*cxx(), "-shared", f"-Wl,-soname,{name}", "-x", "c++", os.devnull, "-o", output]


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
            "above. DFQ_BUILD_CUDA=0 installs without CUDA kernels, DFQ_BUILD_CPP=0 without any "
            "that are compiled."
        )

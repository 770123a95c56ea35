"""Compiling csrc: what is planned, what is skipped and why, with ninja and without."""

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from dfq_kernels import build
from dfq_kernels._compile import cxx, nvcc

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "dfq_kernels" / "_C_cpu.so"
SETTINGS = (
    *("CXX", "CXXFLAGS", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"),
    *("DFQ_BUILD_CPP", "DFQ_BUILD_CUDA", "MAX_JOBS"),
)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def compiler(monkeypatch):
    if not cxx():
        monkeypatch.setenv("CXX", "c++")


def _pretend_missing(monkeypatch, *missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )


def test_plan_takes_every_source(compiler):
    libraries, _ = build.plan(ROOT)
    cpu = next(library for library in libraries if library.name == "_C_cpu")
    assert "csrc/cpu/fake_quantize.cpp" in cpu.sources
    assert set(cpu.sources) == {
        f"csrc/cpu/{path.name}" for path in (ROOT / "csrc/cpu").glob("*.cpp")
    }
    assert "-ffp-contract=off" in build.ARITHMETIC


def test_dfq_build_cpp_0_skips_all(monkeypatch):
    monkeypatch.setenv("DFQ_BUILD_CPP", "0")
    libraries, skipped = build.plan(ROOT)
    assert libraries == []
    assert set(skipped) == {"_C_cpu", "_C_cuda", "_arithmetic"}
    assert "DFQ_BUILD_CPP=0" in skipped["_C_cpu"]


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "install g++ or set CXX" in build.plan(ROOT)[1]["_C_cpu"]


def test_without_csrc(tmp_path):
    assert "run it in a source checkout" in build.plan(tmp_path)[1]["_C_cpu"]


def test_without_torch_or_pybind11(monkeypatch, compiler):
    _pretend_missing(monkeypatch, "torch", "pybind11")
    libraries, skipped = build.plan(ROOT)
    assert libraries == []
    assert "--no-build-isolation" in skipped["_C_cpu"]
    assert set(skipped) == {"_C_cpu", "_C_cuda", "_arithmetic"}
    assert "pybind11 is not installed" in skipped["_arithmetic"]


def test_with_an_old_torch(monkeypatch, compiler):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.1+cpu")
    assert "torch 2.9.1+cpu is too old" in build.plan(ROOT)[1]["_C_cpu"]


@pytest.fixture
def toolkit(monkeypatch, tmp_path, compiler):
    """A CUDA toolkit that is found, and compiles nothing."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return str(nvcc)


def _cuda_library():
    return {library.name: library for library in build.plan(ROOT)[0]}["_C_cuda"]


def test_cuda_is_compiled_where_there_is_nvcc(toolkit, monkeypatch):
    assert nvcc() == [toolkit]
    library = _cuda_library()
    assert set(library.sources) == {
        f"csrc/cuda/{path.name}" for path in (ROOT / "csrc/cuda").glob("*.c*")
    }
    assert library.uses_nvcc
    monkeypatch.setenv("CUDACXX", "/elsewhere/nvcc --threads 2")
    assert nvcc() == ["/elsewhere/nvcc", "--threads", "2"]


def test_cuda_is_skipped_without_nvcc(compiler, monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda n: None if n.endswith("nvcc") else which(n))
    libraries, skipped = build.plan(ROOT)
    assert "_C_cpu" in [library.name for library in libraries]
    assert skipped["_C_cuda"] == (
        "nvcc was not found; install the CUDA toolkit, or set CUDACXX or CUDA_HOME."
    )


def test_dfq_build_cuda_0_skips_cuda_alone(toolkit, monkeypatch):
    monkeypatch.setenv("DFQ_BUILD_CUDA", "0")
    libraries, skipped = build.plan(ROOT)
    assert "_C_cpu" in [library.name for library in libraries]
    assert "DFQ_BUILD_CUDA=0" in skipped["_C_cuda"]


def _codes():
    """{virtual architecture: what is made of its PTX} of the planned library."""
    flags = [flag for flag in _cuda_library().cuda_flags if flag.startswith("-gencode")]
    pairs = [re.fullmatch(r"-gencode=arch=(\w+),code=\[?([\w,]+)\]?", flag) for flag in flags]
    return sorted((pair[1], *pair[2].split(",")) for pair in pairs)


def test_cuda_is_compiled_for_every_generation(toolkit):
    assert _codes() == [
        ("compute_75", "sm_75"),
        ("compute_80", "sm_80", "sm_86", "sm_89"),
        ("compute_90", "compute_90"),
        ("compute_90", "sm_90"),
    ]


@pytest.mark.parametrize(
    ("architectures", "codes"),
    [
        ("9.0", [("compute_90", "sm_90")]),
        ("8.9 8.6+PTX", [("compute_86", "compute_86"), ("compute_86", "sm_89", "sm_86")]),
        ("9.0a;10.0", [("compute_100", "sm_100"), ("compute_90a", "sm_90a")]),
    ],
)
def test_cuda_architectures_are_a_choice(architectures, codes, toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    assert _codes() == codes


def test_an_unknown_cuda_architecture_is_a_reason(toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    assert "TORCH_CUDA_ARCH_LIST='Hopper'" in build.plan(ROOT)[1]["_C_cuda"]


def _tiny_library(root, code):
    (root / "csrc" / "cpu").mkdir(parents=True)
    (root / "csrc" / "cpu" / "tiny.cpp").write_text(code)
    return build.Library("tiny", "tiny.so", ("csrc/cpu/tiny.cpp",), ("-Icsrc",))


EXPORTED = 'extern "C" __attribute__((visibility("default"))) int answer() { return %d; }\n'


@pytest.mark.parametrize("ninja", [True, False], ids=["ninja", "plain"])
@pytest.mark.skipif(not cxx(), reason="no C++ compiler")
def test_compiles_and_replaces(ninja, tmp_path, monkeypatch):
    if ninja and not shutil.which("ninja"):
        pytest.skip("no ninja")
    root = tmp_path / "with space"
    library = _tiny_library(root, EXPORTED % 41)
    if not ninja:
        which = shutil.which
        monkeypatch.setattr(shutil, "which", lambda n: None if n == "ninja" else which(n))
    output = tmp_path / "package" / "tiny.so"
    build.compile_library(library, output, root / "build", root)
    shutil.copy(output, tmp_path / "first.so")
    (root / "csrc/cpu/tiny.cpp").write_text(EXPORTED % 42)
    os.utime(root / "csrc/cpu/tiny.cpp", (2e9, 2e9))  # newer, whatever the clock's grain
    build.compile_library(library, output, root / "build", root)
    assert ctypes.CDLL(str(tmp_path / "first.so")).answer() == 41
    assert ctypes.CDLL(str(output)).answer() == 42
    assert [path.name for path in output.parent.iterdir()] == ["tiny.so"]


@pytest.mark.skipif(not cxx(), reason="no C++ compiler")
def test_a_changed_header_is_compiled_again(tmp_path):
    library = _tiny_library(
        tmp_path, '#include "core/answer.h"\n' + EXPORTED.replace("%d", "ANSWER")
    )
    header = tmp_path / "csrc" / "core" / "answer.h"
    header.parent.mkdir()
    for answer in (41, 42):
        header.write_text(f"#define ANSWER {answer}\n")
        os.utime(header, (2e9 + answer, 2e9 + answer))
        output = tmp_path / f"{answer}.so"
        build.compile_library(library, output, tmp_path / "build", tmp_path)
        assert ctypes.CDLL(str(output)).answer() == answer


@pytest.mark.skipif(not cxx(), reason="no C++ compiler")
def test_a_compiler_error_is_an_error(tmp_path):
    library = _tiny_library(tmp_path, "this is not C++\n")
    with pytest.raises(RuntimeError, match="DFQ_BUILD_CPP=0"):
        build.compile_library(library, tmp_path / "tiny.so", tmp_path / "build", tmp_path)
    assert not (tmp_path / "tiny.so").exists()


@pytest.mark.skipif(not cxx() or not shutil.which("readelf"), reason="no C++ compiler, no readelf")
def test_a_library_that_is_not_here_is_asked_for(tmp_path):
    """As libtorch_cuda.so, where torch is that of a CPU: an empty one of its name is linked."""
    tiny = _tiny_library(tmp_path, EXPORTED % 1)
    link = ("-Wl,--no-as-needed", "-lthere")
    library = dataclasses.replace(tiny, stubs=("libthere.so",), link_flags=link)
    output = tmp_path / "tiny.so"
    build.compile_library(library, output, tmp_path / "build", tmp_path)
    listing = subprocess.run(["readelf", "-d", output], capture_output=True, text=True, check=True)
    assert "[libthere.so]" in listing.stdout


@pytest.mark.skipif(not LIBRARY.exists(), reason="not compiled")
@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_the_library_needs_only_the_stable_abi():
    """No Python, and of torch only C functions: so one binary serves every torch from 2.10 on."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    symbols = {line.split()[-1] for line in listing.splitlines()}
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert not [s for s in symbols if s.startswith(("Py", "_Py"))]
    assert not [s for s in symbols if re.match(r"_ZN?K?(3c10|2at|5torch)", s)]


def test_without_torch_the_build_ends_in_a_sentence(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'torch' else find(n, *a)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "dfq_kernels.build"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "dfq_kernels needs torch, which is not installed; get it from https://pytorch.org.\n"
    )


def _copy_of_the_checkout(to):
    without_builds = shutil.ignore_patterns("*.so", "__pycache__")
    for package in ("dfq", "dfq_kernels", "csrc"):
        shutil.copytree(ROOT / package, to / package, ignore=without_builds)
    for file in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, to / file)
    (to / "README.md").write_text("dfq\n")


def test_without_torch_the_wheel_is_pure_python(tmp_path):
    """What `pip install .` does in isolation: setup.py finds no torch and says so."""
    _copy_of_the_checkout(tmp_path)
    code = "import importlib.util as u, sys; find = u.find_spec; __file__ = 'setup.py'\n"
    code += "u.find_spec = lambda n, *a: None if n in ('torch', 'pybind11') else find(n, *a)\n"
    code += "sys.argv = ['setup.py', '-q', 'bdist_wheel']; exec(open('setup.py').read())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "skipped dfq_kernels._C_cpu: torch is not installed where the build runs" in done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "dfq_kernels/fake_quantize.py" in names
    assert not [name for name in names if name.endswith(".so")]

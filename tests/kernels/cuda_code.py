"""The machine code that nvcc made of csrc/cuda, by the mangled names of its kernels."""

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from dfq_kernels import build
from dfq_kernels._compile import cxx, nvcc

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "dfq_kernels" / "_C_cuda.so"
SOURCES = [*ROOT.glob("csrc/cuda/*"), *ROOT.glob("csrc/core/*.h")]
ROUNDING = "12582912"  # 1.5 * 2^23, added to round


@functools.cache
def library() -> Path:
    """_C_cuda.so as built, or if it is older than its sources, one for two GPUs in the cache."""
    if BUILT.exists() and all(BUILT.stat().st_mtime >= s.stat().st_mtime for s in SOURCES):
        return BUILT
    if not nvcc() or not cxx():
        pytest.skip("there is no nvcc")
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(SOURCES))).hexdigest()
    folder = ROOT / "build" / "cuda_report" / digest[:16]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
        planned = {library.name: library for library in build.plan(ROOT)[0]}
    if not (folder / "_C_cuda.so").exists():
        build.compile_library(planned["_C_cuda"], folder / "_C_cuda.so", folder / "objects", ROOT)
    return folder / "_C_cuda.so"


@functools.cache
def resources() -> dict[tuple[str, str], dict[str, int]]:
    """{(name, GPU): what the kernel takes: REG, STACK, SHARED, LOCAL}."""
    found, gpu, symbol = {}, "", ""
    for line in _dump("-res-usage").splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            gpu = match[1]
        elif match := re.match(r" Function (\S+):", line):
            symbol = match[1]
        elif "REG:" in line:
            numbers = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)
            found[symbol, gpu] = {name: int(number) for name, number in numbers}
    return found


@functools.cache
def instructions(gpu: str) -> dict[str, list[str]]:
    """{name: the kernel's instructions}; nothing if the library has no code for ``gpu``."""
    return {symbol: [line for _, line in lines] for symbol, lines in _code(gpu).items()}


def loop_around(gpu: str, symbol: str, opcode: str) -> list[str]:
    """The instructions of the shortest loop of a kernel that has ``opcode``."""
    lines = _code(gpu)[symbol]
    loops = []
    for end, line in lines:
        back = re.match(r"BRA\b.*0x([0-9a-f]+)", line)
        if back and int(back[1], 16) < end:
            body = [text for address, text in lines if int(back[1], 16) <= address <= end]
            loops += [body] if count(body, opcode) else []
    return min(loops, key=len)


@functools.cache
def _code(gpu: str) -> dict[str, list[tuple[int, str]]]:
    """{name: (address, instruction without its predicate)}."""
    found: dict[str, list[tuple[int, str]]] = {}
    symbol = ""
    for line in _dump("--dump-sass", "-arch", gpu).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            symbol = match[1]
        elif match := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ )?(.*?);", line):
            found.setdefault(symbol, []).append((int(match[1], 16), match[2].strip()))
    return found


def count(lines: Iterable[str], opcode: str) -> int:
    """Instructions whose name begins so."""
    opcodes = Counter(line.split()[0] for line in lines)
    return sum(n for name, n in opcodes.items() if re.match(opcode, name))


def _dump(*options: str) -> str:
    command = [_cuobjdump(), *options, str(library())]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _cuobjdump() -> str:
    """The tool, or that of Triton's wheel; importing triton is not needed to find it."""
    spec = importlib.util.find_spec("triton")
    places = (spec and spec.submodule_search_locations) or []
    path = os.pathsep.join(str(Path(place) / "backends/nvidia/bin") for place in places)
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=path)
    return found or pytest.skip("there is no cuobjdump")

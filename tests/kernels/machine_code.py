"""Triton kernels compiled ahead of time for GPUs that are not here, and what their code shows.

A case calls an op with tensors on the meta device: what it launches is specialized by Triton as on
a GPU, compiled by Triton's own ptxas, disassembled, and counted. Each family of kernels lists its
cases in a module machine_code_<family>.py; test_machine_code.py holds them to their budgets.

All are compiled in one process of their own: this one imported the kernels for the interpreter.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EVERY_ARCHITECTURE = (80, 86, 89, 90)
ROUNDING = "12582912"  # 1.5 * 2^23: added to round, and never in a fused multiply-add


@dataclass(frozen=True)
class Budget:
    """What the code of one kernel may cost. Nothing may be spilled, no rounding contracted.

    ``instructions``, and what is counted among them, are those of one pass of the longest innermost
    loop, or of the whole kernel if it has none.
    """

    registers: int
    instructions: int
    loads: int  # exactly so many of 16 bytes
    stores: int  # exactly so many of 16 bytes
    narrow: int | None = None  # loads and stores of less, at most; None is any number
    rounded: int = 0  # in the whole kernel at least so many additions of the rounding constant
    fused: int | None = 0  # multiply-adds, at most; None is any number
    divided: int = 0  # multiply-adds, at least: those of a division that is rounded correctly
    shared: int = 0  # loads and stores of shared memory, at most
    products: int = 0  # of matrices of int8, in tensor cores: exactly
    exact: bool = False  # whether there is no multiply-add in the whole kernel


@dataclass(frozen=True)
class Case:
    """A call on the meta device, and a budget for each kernel of interest that it launches."""

    name: str
    call: Callable[[], object]
    budgets: Mapping[str, Budget]
    architectures: tuple[int, ...] = (80, 90)  # the code for 86 and 89 hardly differs from 80's


@dataclass(frozen=True)
class Figures:
    """What the machine code of a kernel has."""

    registers: int
    stack: int  # bytes, as local
    local: int
    total: int  # instructions
    loop: int  # those of the longest innermost loop; 0 without one
    counted: dict[str, int]  # by opcode: of the loop, or of the kernel if it has none
    rounding: dict[str, int]  # by opcode: what adds the rounding constant
    fused: int  # multiply-adds in the whole kernel

    @property
    def instructions(self) -> int:
        return self.loop or self.total

    def count(self, pattern: str) -> int:
        """Counted instructions whose whole opcode matches."""
        return sum(n for opcode, n in self.counted.items() if re.fullmatch(pattern, opcode))


def families() -> list[str]:
    """The modules with cases."""
    return sorted(path.stem for path in HERE.glob("machine_code_*.py"))


def figures(families: Iterable[str]) -> dict[tuple[str, str, int], Figures]:
    """By name of the case, name of the kernel, and architecture."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, __file__, *families], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"a kernel does not compile:\n{done.stderr[-4000:]}")
    lines = (json.loads(line) for line in done.stdout.splitlines())
    return {(case, kernel, sm): Figures(**found) for case, kernel, sm, found in lines}


def _main(families: list[str]) -> None:
    sys.path.insert(0, str(HERE))
    cases = [case for family in families for case in importlib.import_module(family).CASES]
    with ThreadPoolExecutor() as pool:  # the disassembler takes as long as the compiler
        read = {}
        for case in cases:
            for architecture in case.architectures:
                _pretend_to_have(architecture)
                with _compiling_instead_of_launching(set(case.budgets)) as compiled:
                    case.call()
                for kernel, cubin in compiled.items():
                    read[case.name, kernel, architecture] = pool.submit(_read, cubin)
        for key, found in read.items():
            print(json.dumps([*key, asdict(found.result())]))


@contextmanager
def _compiling_instead_of_launching(wanted: set[str]) -> Iterator[dict[str, bytes]]:
    """What those of the kernels that run within the block become, by name."""
    from triton.runtime.jit import JITFunction

    compiled, run = {}, JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if self.fn.__name__ in wanted:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
            compiled[self.fn.__name__] = kernel.asm["cubin"]

    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run


def _pretend_to_have(architecture: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: architecture,  # Triton keeps kernels by device
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        )
    )


def _read(cubin: bytes) -> Figures:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-sass", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    line = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", re.M)
    code = [(int(at, 16), opcode, rest) for at, opcode, rest in line.findall(text)]
    code = [line for line in code if line[1] != "NOP"]
    loop = _longest_innermost_loop(code)
    return Figures(
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        total=len(code),
        loop=len(loop),
        counted=dict(Counter(opcode for _, opcode, _ in loop or code)),
        rounding=dict(
            Counter(opcode for _, opcode, rest in code if re.search(rf" {ROUNDING}\b", rest))
        ),
        fused=sum(opcode.startswith("FFMA") for _, opcode, _ in code),
    )


def _longest_innermost_loop(code: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """From the target of a branch back to the branch."""
    ranges = set()
    for address, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            ranges.add((int(target[1], 16), address))
    innermost = (
        (first, last)
        for first, last in ranges
        if not any(first <= a and b <= last for a, b in ranges - {(first, last)})
    )
    bodies = ([line for line in code if first <= line[0] <= last] for first, last in innermost)
    return max(bodies, key=len, default=[])


if __name__ == "__main__":
    _main(sys.argv[1:])

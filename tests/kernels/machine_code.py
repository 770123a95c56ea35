"""Triton kernels compiled ahead of time for GPUs that are not here, and what their code shows.

``figures(cases)`` compiles every case for every architecture in one process, because kernels that
were imported for the interpreter cannot be compiled. Ptxas and the disassembler are Triton's own.
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
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 86, 89, 90)
ROUNDING = "12582912"  # 1.5 * 2^23: added to round, never in a fused multiply-add


@dataclass(frozen=True)
class Case:
    """One specialization of a kernel, and what its machine code may cost at most.

    ``arguments`` gives each argument in order its Triton type ("*fp32", "i32"), "aligned" behind it
    if it is a multiple of 16; a constant as ``{"constant": value}``; a tuple as a list of those.
    The wide counts are 16-byte instructions; ``instructions`` counts one pass of the longest
    innermost loop, or the whole kernel if it has none.
    """

    name: str
    module: str
    kernel: str
    arguments: Mapping[str, Any]
    num_warps: int
    registers: int
    instructions: int
    wide_loads: int
    wide_stores: int
    rounded: int = 0  # elements that a thread rounds
    fused: int = 0  # multiply-adds that may be: those of a correctly rounded division
    shared: int = 0  # loads and stores of shared memory in the counted instructions


@dataclass(frozen=True)
class Figures:
    """What the machine code of a case has."""

    registers: int
    stack: int
    local: int
    total: int
    loop: int  # instructions of the longest innermost loop, 0 without one
    opcodes: dict[str, int] = field(default_factory=dict)
    loop_opcodes: dict[str, int] = field(default_factory=dict)
    added: int = 0  # FADDs of the rounding constant
    contracted: int = 0  # FFMAs with it

    def count(self, pattern: str, *, loop: bool = False) -> int:
        """Instructions whose whole opcode matches, in all code or in the loop (if there is one)."""
        opcodes = self.loop_opcodes if loop and self.loop else self.opcodes
        return sum(n for opcode, n in opcodes.items() if re.fullmatch(pattern, opcode))


def figures(cases: Iterable[Case]) -> dict[tuple[str, int], Figures]:
    """Figures by name of the case and architecture."""
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([asdict(case) for case in cases]),
        env={**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"a kernel does not compile:\n{done.stderr[-4000:]}")
    lines = (json.loads(line) for line in done.stdout.splitlines())
    return {(name, architecture): Figures(**found) for name, architecture, found in lines}


def _compile(case: Mapping[str, Any], architecture: int) -> bytes:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(case["module"]), case["kernel"])
    signature, constants, attributes = {}, {}, {}
    if list(case["arguments"]) != kernel.arg_names:
        raise ValueError(f"{case['name']}: {case['kernel']} takes {kernel.arg_names}")

    def of(argument: Any, path: tuple[int, ...]) -> Any:
        if isinstance(argument, list):
            return tuple(of(part, (*path, i)) for i, part in enumerate(argument))
        if isinstance(argument, dict):
            constants[path] = argument["constant"]
            return "constexpr"
        kind, _, aligned = argument.partition(" ")
        if aligned:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for index, (name, argument) in enumerate(case["arguments"].items()):
        signature[name] = of(argument, (index,))
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": case["num_warps"], "enable_fp_fusion": False}
    return triton.compile(source, GPUTarget("cuda", architecture, 32), options).asm["cubin"]


def _read(cubin: bytes) -> Figures:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-sass", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(n) for key, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", text, re.M)
    code = [(int(address, 16), opcode, rest) for address, opcode, rest in code if opcode != "NOP"]
    loop = _longest_innermost_loop(code)
    with_constant = [
        opcode for _, opcode, rest in code if ROUNDING in rest and "-" + ROUNDING not in rest
    ]
    return Figures(
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        total=len(code),
        loop=len(loop),
        opcodes=dict(Counter(opcode for _, opcode, _ in code)),
        loop_opcodes=dict(Counter(opcode for _, opcode, _ in loop)),
        added=sum(opcode.startswith("FADD") for opcode in with_constant),
        contracted=sum(opcode.startswith("FFMA") for opcode in with_constant),
    )


def _longest_innermost_loop(code: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """Between a branch back and its target; what waits forever behind the last EXIT is none."""
    ranges = []
    for address, opcode, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            ranges.append((int(target[1], 16), address))
    bodies = [
        [line for line in code if first <= line[0] <= last]
        for first, last in ranges
        if not any((first, last) != r and first <= r[0] and r[1] <= last for r in ranges)
    ]
    return max(bodies, key=len, default=[])


def _main() -> None:
    for case in json.load(sys.stdin):
        for architecture in ARCHITECTURES:
            found = _read(_compile(case, architecture))
            print(json.dumps([case["name"], architecture, asdict(found)]))


if __name__ == "__main__":
    _main()

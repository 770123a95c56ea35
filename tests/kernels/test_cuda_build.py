"""The machine code that nvcc makes of csrc/cuda, with no GPU: what it costs, and that it loads."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from dfq_kernels import _backend, build
from dfq_kernels._compile import cxx, nvcc

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "dfq_kernels" / "_C_cuda.so"
SOURCES = [*ROOT.glob("csrc/cuda/*"), *ROOT.glob("csrc/core/*.h")]
DISASSEMBLED = ("sm_80", "sm_90")
ROUNDING = "12582912"  # 1.5 * 2^23, added to round

# Registers, on any GPU: below 65 four blocks of 256 threads are on a multiprocessor at a time, of
# at most 85 three, of at most 128 two. "one": a channel a vector; "each": a channel an element.
REGISTERS = {
    "walk one FakeQuantize": {"float": 40, "Half": 64, "BFloat16": 64},
    "walk each FakeQuantize": {"float": 56, "Half": 96, "BFloat16": 96},
    "walk strided FakeQuantize": {"float": 56},
    "walk one FakeQuantizeBackward": {"float": 68, "Half": 96, "BFloat16": 96},
    "walk each FakeQuantizeBackward": {"float": 88, "Half": 116, "BFloat16": 116},
    "walk strided FakeQuantizeBackward": {"float": 76},
    "walk one NormalizeElement": {"float": 64, "Half": 64, "BFloat16": 64},
    "walk each NormalizeElement": {"float": 72, "Half": 100, "BFloat16": 100},
    "walk strided NormalizeElement": {"float": 80},
    "walk one NormalizeElementBackward": {"float": 64, "Half": 80, "BFloat16": 80},
    "walk each NormalizeElementBackward": {"float": 88, "Half": 128, "BFloat16": 128},
    "walk strided NormalizeElementBackward": {"float": 88},
    "walk_all each FakeQuantize": {"float": 64, "Half": 100, "BFloat16": 100},
    "walk_all each FakeQuantizeBackward": {"float": 88, "Half": 120, "BFloat16": 120},
    "fill_table": {"": 32},
    "finish": {"": 48},
    "finish_all": {"": 48},
    "finish FinishBatchNorm": {"": 56},
    "finish FinishStatistics": {"": 64},
}
SHARED = {"float": 18 * 1024, "Half": 34 * 1024, "BFloat16": 34 * 1024, "": 2048}


def _cuobjdump():
    """The tool, or that of Triton's wheel; importing triton is not needed to find it."""
    spec = importlib.util.find_spec("triton")
    places = (spec and spec.submodule_search_locations) or []
    path = os.pathsep.join(str(Path(place) / "backends/nvidia/bin") for place in places)
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=path)
    return found or pytest.skip("there is no cuobjdump")


@pytest.fixture(scope="session")
def library():
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


def _dump(library, *options):
    command = [_cuobjdump(), *options, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _family(symbol):
    """(family, storage type) of a mangled name, as in REGISTERS."""
    name = re.search(r"\d(walk_all|walk|fill_table|finish_all|finish)(?![a-z_])", symbol)[1]
    arguments = symbol[symbol.index(name) + len(name) :]
    if not name.startswith("walk"):
        of = re.match(r"INS.*?\d(Finish[A-Za-z]+?)E", arguments)
        return (f"{name} {of[1]}" if of else name), ""
    storage = (
        "float" if arguments.startswith("If") else re.search(r"\d(Half|BFloat16)", arguments)[1]
    )
    each = name == "walk_all" or "Lb1E" in arguments
    way = "strided" if "7Strided" in arguments else "each" if each else "one"
    op = re.search(r"\d((?:FakeQuantize|NormalizeElement)(?:Backward)?)E", arguments)[1]
    return f"{name} {way} {op}", storage


@pytest.fixture(scope="session")
def usage(library):
    """{(family, storage): {GPU: its resources}}."""
    found, gpu, symbol = defaultdict(dict), None, None
    for line in _dump(library, "-res-usage").splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            gpu = match[1]
        elif match := re.match(r" Function (\S+):", line):
            symbol = match[1]
        elif "REG:" in line:
            numbers = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)
            found[_family(symbol)][gpu] = {name: int(number) for name, number in numbers}
    return found


@pytest.fixture(scope="session")
def code(library):
    """{(family, storage, GPU): its instructions}."""
    found = defaultdict(list)
    for gpu in DISASSEMBLED:
        key = None
        for line in _dump(library, "--dump-sass", "-arch", gpu).splitlines():
            if match := re.search(r"Function : (\S+)", line):
                key = (*_family(match[1]), gpu)
            elif match := re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?(.*?);", line):
                found[key].append(match[1].strip())
    return found


def test_every_kernel_has_a_budget(usage):
    kernels = {(family, storage) for family, of in REGISTERS.items() for storage in of}
    assert set(usage) == kernels


def test_no_registers_are_spilled_and_there_is_no_stack(usage):
    for kernel, by_gpu in usage.items():
        for gpu, used in by_gpu.items():
            assert used["STACK"] == used["LOCAL"] == 0, (kernel, gpu)


def test_registers_and_shared_memory_are_within_budget(usage):
    for (family, storage), by_gpu in usage.items():
        for gpu, used in by_gpu.items():
            assert used["REG"] <= REGISTERS[family][storage], (family, storage, gpu, used["REG"])
            assert used["SHARED"] <= SHARED[storage], (family, storage, gpu, used["SHARED"])


def _opcodes(instructions):
    return Counter(instruction.split()[0] for instruction in instructions)


def _count(instructions, opcode):
    return sum(n for name, n in _opcodes(instructions).items() if re.match(opcode, name))


def test_dense_tensors_are_moved_in_sixteen_bytes(code):
    """Each input at least once, and the output; from vectors nothing is loaded piece by piece."""
    for (family, storage, gpu), instructions in code.items():
        if not family.startswith("walk") or "strided" in family:
            continue
        inputs = 1 if family.endswith(("FakeQuantize", "NormalizeElement")) else 2
        assert _count(instructions, r"LDG\.E\.128") >= inputs, (family, storage, gpu)
        assert _count(instructions, r"STG\.E\.128") == 1, (family, storage, gpu)
        assert _count(instructions, "LDL|STL") == 0, (family, storage, gpu)


def test_no_rounding_is_contracted(code):
    """x * inverse is rounded before anything is added to it: no multiply-add has the constant."""
    for kernel, instructions in code.items():
        rounding = [line for line in instructions if ROUNDING in line]
        assert not [line for line in rounding if "FFMA" in line], kernel
        if "FakeQuantize" in kernel[0]:
            assert len([line for line in rounding if line.startswith("FADD")]) >= 8, kernel


def _multiply_adds(family, storage):
    """How many there may be: a quotient takes 2 to 5 and a subroutine, once a kernel."""
    lanes = 4 if storage == "float" else 8
    if " FakeQuantize" in family:  # 1 / scale, of each channel
        return 7 + 2 * (1 if " one " in family else lanes)
    if family.endswith(" NormalizeElement"):  # the squares; a mean, and of one channel two
        return lanes + (23 if " one " in family else 18)
    return 0


def test_every_operation_is_rounded(code):
    """There are no multiply-adds but those meant to be: in y, dx and their sums there are none."""
    for (family, storage, gpu), instructions in code.items():
        if family.startswith("walk"):
            found = _count(instructions, "FFMA")
            assert found <= _multiply_adds(family, storage), (family, storage, gpu, found)


LOADS = """
import ctypes, sys, torch
from dfq_kernels import _backend
ctypes.CDLL(sys.argv[2])  # in the place of the libtorch_cuda of a CUDA build
assert _backend._load_library("cpu")
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
assert not has_kernel("dfq_C::fake_quantize", "CUDA")
torch.ops.load_library(sys.argv[1])
print(*(op for op in sys.argv[3:] if not has_kernel(f"dfq_C::{op}", "CUDA")))
"""


def test_the_library_loads_and_has_every_op(library, tmp_path):
    """With an empty libtorch_cuda.so, as there is no other here: nothing else is missing."""
    if not cxx() or not _backend._load_library("cpu"):
        pytest.skip("there is no C++ compiler, or no _C_cpu.so")
    source = tmp_path / "stub.cpp"
    source.write_text(
        'extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 0; }'
    )
    stub = tmp_path / "libtorch_cuda.so"
    flags = ["-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", str(source), "-o", str(stub)]
    subprocess.run([*cxx(), *flags], check=True)
    texts = [path.read_text() for path in ROOT.glob("csrc/cuda/*.cpp")]
    ops = sorted({op for text in texts for op in re.findall(r'm\.impl\("(\w+)"', text)})
    assert {"fake_quantize", "batch_norm", "fake_quantize_all"} <= set(ops)
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(library), str(stub), *ops],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []

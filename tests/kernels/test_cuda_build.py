"""The machine code that nvcc makes of csrc/cuda, with no GPU: what it costs, and that it loads."""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import cuda_code
import pytest
from cuda_code import ROUNDING

from dfq_kernels import _backend
from dfq_kernels._compile import cxx

ROOT = Path(__file__).parents[2]
DISASSEMBLED = ("sm_80", "sm_90")

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


def _family(symbol):
    """(family, storage type) of a mangled name, as in REGISTERS; None for kernels of other ops."""
    found = re.search(r"\d(walk_all|walk|fill_table|finish_all|finish)(?![a-z_])", symbol)
    if not found:
        return None
    name = found[1]
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


@pytest.fixture(scope="module")
def usage():
    """{(family, storage): {GPU: its resources}}."""
    found = defaultdict(dict)
    for (symbol, gpu), used in cuda_code.resources().items():
        if family := _family(symbol):
            found[family][gpu] = used
    return found


@pytest.fixture(scope="module")
def code():
    """{(family, storage, GPU): its instructions}."""
    return {
        (*family, gpu): instructions
        for gpu in DISASSEMBLED
        for symbol, instructions in cuda_code.instructions(gpu).items()
        if (family := _family(symbol))
    }


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


def test_dense_tensors_are_moved_in_sixteen_bytes(code):
    """Each input at least once, and the output; from vectors nothing is loaded piece by piece."""
    for (family, storage, gpu), instructions in code.items():
        if not family.startswith("walk") or "strided" in family:
            continue
        inputs = 1 if family.endswith(("FakeQuantize", "NormalizeElement")) else 2
        assert cuda_code.count(instructions, r"LDG\.E\.128") >= inputs, (family, storage, gpu)
        assert cuda_code.count(instructions, r"STG\.E\.128") == 1, (family, storage, gpu)
        assert cuda_code.count(instructions, "LDL|STL") == 0, (family, storage, gpu)


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
            found = cuda_code.count(instructions, "FFMA")
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


def test_the_library_loads_and_has_every_op(tmp_path):
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
        [sys.executable, "-c", LOADS, str(cuda_code.library()), str(stub), *ops],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []

"""The machine code of the CUDA kernels of qlinear and qconv2d: tensor cores, loads, registers."""

import re
from dataclasses import dataclass

import cuda_code
import pytest
from cuda_code import ROUNDING, count

GPUS = ["sm_75", "sm_80", "sm_89", "sm_90"]  # the code for sm_86 is that for sm_89
SHARED = 49 * 1024  # bytes: more would have to be asked for; some GPUs keep one KB for themselves
# Instructions of a step, with those for integers other than 0 that stand for real zero: of 64 along
# K, and of 128 where both x and weights are packed.
LOOP = {"sm_75": (420, 500), "sm_80": (380, 450), "sm_89": (380, 450), "sm_90": (400, 580)}


@dataclass(frozen=True)
class Kernel:
    """One instance of the template; its arguments in their order."""

    packed_x: bool
    packed_weight: bool
    vectors: bool
    wide: bool

    @property
    def registers(self):
        """Of 128 threads three blocks are on a multiprocessor at a time, of 256 two."""
        return 128 if self.wide else 168

    def products(self, gpu):
        """The opcode of a product, and how many a step has."""
        int4 = self.packed_x and self.packed_weight and gpu != "sm_90"
        if gpu == "sm_75":  # in quarters
            return (r"IMMA\.8832\.S4\.S4" if int4 else r"IMMA\.8816\.S8\.S8"), 128
        return (r"IMMA\.16864\.S4\.S4" if int4 else r"IMMA\.16832\.S8\.S8"), 32


def _kernel(symbol):
    found = re.search(r"integer_gemm_kernelINS_4TileILb([01])ELb([01])ELb([01])ELi([12])E", symbol)
    return found and Kernel(*(n == "1" for n in found.groups()[:3]), found[4] == "2")


EVERY = {
    Kernel(x, weight, vectors, wide)
    for x in (False, True)
    for weight in (False, True)
    for vectors, wide in ((False, False), (True, False), (True, True))
}


def test_no_registers_are_spilled_and_all_are_within_budget():
    """On every GPU for which there is code."""
    found = {}
    for (symbol, gpu), used in cuda_code.resources().items():
        if kernel := _kernel(symbol):
            found.setdefault(gpu, set()).add(kernel)
            assert used["STACK"] == used["LOCAL"] == 0, (kernel, gpu)
            assert used["SHARED"] <= SHARED, (kernel, gpu)
            one_block = kernel.wide and gpu == "sm_75"  # as shared memory has it there
            assert used["REG"] <= (168 if one_block else kernel.registers), (kernel, gpu)
    assert {"sm_80", "sm_90"} <= set(found)
    assert all(kernels == EVERY for kernels in found.values())


@pytest.fixture(params=GPUS)
def code(request):
    """(GPU, {symbol: kernel}, {symbol: instructions})."""
    kernels = {s: k for s in cuda_code.instructions(request.param) if (k := _kernel(s))}
    if not kernels:
        pytest.skip(f"the library has no code for {request.param}")
    return request.param, kernels, cuda_code.instructions(request.param)


def test_products_are_those_of_the_gpu(code):
    """4-bit ones where it has them; nothing else is multiplied on its tensor cores."""
    gpu, kernels, instructions = code
    for symbol, kernel in kernels.items():
        opcode, a_step = kernel.products(gpu)
        assert count(instructions[symbol], "IMMA|HMMA") == a_step, kernel
        assert count(instructions[symbol], opcode) == a_step, kernel


def test_a_step_is_short_and_moves_segments(code):
    gpu, kernels, _ = code
    for symbol, kernel in kernels.items():
        if not kernel.vectors:
            continue
        moved = r"LDG\.E\.128" if gpu == "sm_75" else r"LDGSTS\.E\.BYPASS\.128"
        loop = cuda_code.loop_around(gpu, symbol, moved)
        both = kernel.packed_x and kernel.packed_weight
        assert len(loop) <= LOOP[gpu][both], (kernel, len(loop))
        segments = (2 if kernel.packed_x and not kernel.packed_weight else 4) / (1 + kernel.wide)
        assert count(loop, r"LDSM\.16\.M88\.4") >= 6, kernel
        assert count(loop, moved) > segments, kernel
        assert count(loop, r"LDG\.E\.[US]8") == 0, kernel


def test_every_operation_is_rounded(code):
    """The epilogue has a product and a sum, and no multiply-add of both."""
    _, kernels, instructions = code
    for symbol, kernel in kernels.items():
        lines = instructions[symbol]
        assert count(lines, "FFMA") == 0, kernel
        assert count(lines, "FMUL") >= 8, kernel
        rounding = [line for line in lines if ROUNDING in line]
        assert len(rounding) >= 4, kernel
        assert all(line.startswith("FADD") for line in rounding), kernel

"""The machine code that nvcc makes of depthwise convolutions: what it costs."""

import re

import cuda_code
import pytest

# Registers of a thread, on any GPU: 85 let six blocks of 128 be on a multiprocessor at a time.
REGISTERS = {"3": 85, "5": 160, "7": 255, "any": 64}
WORDS = {"3": 3, "5": 10, "7": 14}  # of four bytes, in the filter of a channel
GPUS = ["sm_80", "sm_90"]


def _size(symbol):
    found = re.search(r"\ddepthwise_(any|columnsILi(\d))", symbol)
    return found and (found[2] or found[1])


@pytest.mark.parametrize("size", REGISTERS)
def test_registers_and_no_stack(size):
    found = [used for (symbol, _), used in cuda_code.resources().items() if _size(symbol) == size]
    assert found
    for used in found:
        assert used["STACK"] == used["LOCAL"] == 0
        assert used["REG"] <= REGISTERS[size]


@pytest.mark.parametrize("gpu", GPUS)
def test_instructions(gpu):
    """Four products at once; no product of the epilogue is fused with what is added to it."""
    found = {_size(symbol): lines for symbol, lines in cuda_code.instructions(gpu).items()}
    assert set(REGISTERS) == set(found) - {None}
    for size in REGISTERS:
        lines = found[size]
        assert cuda_code.count(lines, "FFMA") == 0, size
        rounding = [line for line in lines if cuda_code.ROUNDING in line]
        assert len([line for line in rounding if line.startswith("FADD")]) == 4, size
    for size, words in WORDS.items():
        # those of four channels, once with the filter and once with ones, for the weights' zero
        assert cuda_code.count(found[size], r"IDP\.4A") == 2 * 4 * words, size

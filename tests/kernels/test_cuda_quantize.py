"""The machine code that nvcc makes of quantize and requantize: what it costs."""

import re

import cuda_code
import pytest

# Registers of a thread, on any GPU: below 65 four blocks of 256 are on a multiprocessor at a time.
REGISTERS = {
    "quantize_same": {"f": 40, "Half": 40, "BFloat16": 40},
    "quantize_planes": {"f": 40, "Half": 56, "BFloat16": 48},
    "quantize_any": {"": 40},
    "requantize_codes": {"": 40},
}
TURING = 64  # registers of a thread with which a processor of sm_75 still holds its 1024 threads
LOADS = {"quantize_same": 4, "quantize_planes": 4, "requantize_codes": 2}  # of 16 bytes
# Of a kernel with all its ways, of which a thread takes one, for its 16 elements of float32, and of
# bfloat16 for 32; requantize_codes has 32.
INSTRUCTIONS = {"quantize_same": 300, "quantize_planes": 880, "requantize_codes": 540}
FROM_16_BITS = {"quantize_same": 490, "quantize_planes": 1180}
ALL = [(kernel, storage) for kernel, of in REGISTERS.items() for storage in of]


def _key(symbol):
    found = re.search(r"\d(quantize_(?:same|planes|any)|requantize_codes)(.*)", symbol)
    if not found:
        return None
    storage = re.match(r"I(f|NS_\d+(Half|BFloat16))", found[2])
    return found[1], (storage[2] or storage[1]) if storage else ""


def _of_ours(by_symbol):
    return {_key(symbol): found for symbol, found in by_symbol.items() if _key(symbol)}


@pytest.mark.parametrize(("kernel", "storage"), ALL)
def test_registers_and_no_stack(kernel, storage):
    found = {
        gpu: used
        for (symbol, gpu), used in cuda_code.resources().items()
        if _key(symbol) == (kernel, storage)
    }
    assert found
    for gpu, used in found.items():
        assert used["STACK"] == used["LOCAL"] == 0
        assert used["REG"] <= (TURING if gpu == "sm_75" else REGISTERS[kernel][storage])
        assert used["SHARED"] <= (13 * 1024 if kernel == "quantize_planes" else 0) + 1024


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_instructions(gpu):
    """Wide loads, as many as one thread waits for, and no product fused with the rounding."""
    found = _of_ours(cuda_code.instructions(gpu))
    assert set(found) == set(ALL)
    for (kernel, storage), lines in found.items():
        rounding = [line for line in lines if cuda_code.ROUNDING in line]
        assert not [line for line in rounding if "FFMA" in line], (kernel, storage)
        assert len([line for line in rounding if line.startswith("FADD")]) >= 1
        if kernel == "quantize_any":
            continue
        assert cuda_code.count(lines, r"LDG\.E\.128") == LOADS[kernel], (kernel, storage)
        most = (FROM_16_BITS if len(storage) > 1 else INSTRUCTIONS)[kernel]
        assert len(lines) <= most, (kernel, storage)


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_neighbours_are_stored_together(gpu):
    """What a thread makes of 16 bytes."""
    for (kernel, storage), lines in _of_ours(cuda_code.instructions(gpu)).items():
        if kernel == "quantize_same":
            assert cuda_code.count(lines, r"STG\.E$" if storage == "f" else r"STG\.E\.64$") == 4
        if kernel == "requantize_codes":
            assert cuda_code.count(lines, r"STG\.E\.128") == 2

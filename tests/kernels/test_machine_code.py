"""The Triton kernels, compiled for real GPUs, keep to their budgets."""

import functools
import importlib

import machine_code
import pytest

pytest.importorskip("triton")

KERNELS = [
    pytest.param(family, (case.name, kernel, sm), budget, id=f"{case.name}-{kernel}-sm_{sm}")
    for family in machine_code.families()
    for case in importlib.import_module(family).CASES
    for kernel, budget in case.budgets.items()
    for sm in case.architectures
]


@functools.cache
def _figures(family):
    return machine_code.figures([family])


@pytest.mark.parametrize(("family", "kernel", "budget"), KERNELS)
def test_budget(family, kernel, budget):
    found = _figures(family)[kernel]
    assert found.stack == found.local == found.count("LDL.*|STL.*") == 0
    assert found.registers <= budget.registers
    assert found.instructions <= budget.instructions
    loads, stores = found.count(r"LDG\S*\.128\S*"), found.count(r"STG\S*\.128\S*")
    assert (loads, stores) == (budget.loads, budget.stores)
    narrow = found.count(r"(LDG|LDGSTS|STG)\..*") - loads - stores
    assert budget.narrow is None or narrow <= budget.narrow
    assert found.count("LDS.*|STS.*") <= budget.shared
    assert budget.fused is None or found.count("FFMA.*") <= budget.fused
    assert found.count("FFMA.*") >= budget.divided
    assert found.fused == 0 or not budget.exact
    assert found.count("IG?MMA.*") == budget.products
    assert found.rounding.get("FADD", 0) >= budget.rounded
    assert not any("MA" in opcode for opcode in found.rounding)

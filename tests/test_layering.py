"""dfq -> dfq_kernels -> csrc, never back; inside dfq only downwards, siblings unaware."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [  # a module imports only itself and rows above its own
    ["dfq_kernels"],
    ["dfq.types", "dfq.descent", "dfq.depthwise", "dfq.hooks"],
    ["dfq.bounds", "dfq.outputs"],
    ["dfq.models", "dfq.data"],
    ["dfq.prepare", "dfq.synthesize", "dfq.distill"],
    ["dfq.deploy"],
    ["dfq.methods"],
    ["dfq.evaluate", "dfq.report"],
    ["dfq.pipeline"],
    ["dfq.demo"],
    ["dfq.cli"],
]
NOT_OPS = {"integer", "build"}


def _place(module):
    """(row, package) of a module, or None if it is not ours."""
    for row, packages in enumerate(ROWS):
        for package in packages:
            if module == package or module.startswith(f"{package}."):
                return row, package
    return None


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


SOURCES = sorted(p for package in ("dfq", "dfq_kernels") for p in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    here = _place(module)
    assert here or module == "dfq", f"{module} has no row; add it to ROWS"
    for target in _imports(path):
        there = _place(target)
        if here and there and here != there:
            assert there[0] < here[0], f"{module} imports {target}; move what they share up a row"


@pytest.mark.parametrize(
    "op", sorted(p.stem for p in (ROOT / "dfq_kernels").glob("[a-z]*.py") if p.stem not in NOT_OPS)
)
def test_every_op_has_a_test_and_a_bench(op):
    for companion in (f"tests/kernels/test_{op}.py", f"bench/bench_{op}.py"):
        assert (ROOT / companion).exists(), f"dfq_kernels/{op}.py needs {companion}"


def test_real_data_is_opened_by_evaluate_alone():
    """Only evaluate and the commands that call it may import dfq.data."""
    readers = {p.relative_to(ROOT).as_posix() for p in SOURCES if "dfq.data" in set(_imports(p))}
    assert readers <= {"dfq/evaluate.py"}

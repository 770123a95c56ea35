"""``pytest bench/bench_<op>.py`` measures; a table of ratios follows the usual one.

pyproject.toml disables pytest-benchmark for the test suite; here it is enabled again, unless
``DFQ_BENCH=tiny``. Nothing here needs it: without it, run pytest with ``-o addopts=``.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import harness, record
from bench.settings import DEVICE, TINY


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if DEVICE not in ("cpu", "cuda"):
        raise pytest.UsageError(f"DFQ_BENCH_DEVICE must be cpu or cuda, got {DEVICE!r}.")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("DFQ_BENCH_DEVICE=cuda, but torch finds no CUDA device; unset it.")
    if not TINY and config.pluginmanager.hasplugin("benchmark"):
        config.option.benchmark_disable = False
    record.start()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.update(record.circumstances())


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Callable[[harness.Case], list[harness.Row]]:
    """Check a case, then time and record it."""
    torch.manual_seed(0)
    installed = request.config.pluginmanager.hasplugin("benchmark")
    benchmark = request.getfixturevalue("benchmark") if installed else None
    return functools.partial(harness.measure, benchmark=benchmark)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if harness.ROWS:
        terminalreporter.section("times faster than the baselines; CPU: one thread unless said")
        for heading, rows in itertools.groupby(harness.ROWS, harness.Row.heading):
            terminalreporter.write_line(heading)
            for row in rows:
                terminalreporter.write_line(str(row).replace(heading, "   "))

"""``pytest bench/bench_<op>.py`` measures; a table of ratios follows the usual one.

pyproject.toml disables measuring for the test suite; here it is enabled again, unless
``DFQ_BENCH=tiny``. Save a record with ``--benchmark-json=FILE``.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from bench import harness


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not harness.TINY:
        config.option.benchmark_disable = False


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info.update(harness.machine())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with harness.threads(1):
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if harness.RATIOS:
        terminalreporter.section("times faster than the baselines, one thread unless said")
        for ratio in harness.RATIOS:
            terminalreporter.write_line(str(ratio))

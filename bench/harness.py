"""Check, then measure. No figure without its gate, its baseline in the same run, and the machine.

``DFQ_BENCH=tiny`` runs every case once on tiny shapes and asserts no ratio: the test suite does.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]
TINY = os.environ.get("DFQ_BENCH") == "tiny"
ROUNDS = 2 if TINY else 15


@dataclass(frozen=True)
class Ratio:
    """One line of the table: how many times faster we are than a baseline, and the aim."""

    case: str
    baseline: str
    ours_ns: float  # an element
    ratio: float
    aim: float | None  # None: only recorded

    def __str__(self) -> str:
        line = f"{self.case:40s} {self.ours_ns:8.3f} ns/element  {self.ratio:7.2f}x {self.baseline}"
        return line if self.aim is None else f"{line}  aim {self.aim:g}"


RATIOS: list[Ratio] = []


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's number of threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best_seconds(runs: dict[str, Run], clock: Callable[[], float]) -> dict[str, float]:
    """The shortest time of each, in turns, so that all see the same machine.

    A turn is three runs: the first brings its own data back into the caches.
    """
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(ROUNDS):
        for name, run in runs.items():
            for _ in range(1 if TINY else 3):
                start = clock()
                run()
                best[name] = min(best[name], clock() - start)
    return best


def compare(
    benchmark: Any,
    ours: Run,
    baselines: dict[str, tuple[Run, float | None]],
    *,
    elements: int,
    clock: Callable[[], float] = time.thread_time,
) -> None:
    """Measure ``ours`` against each baseline (and the ratio to reach) and record it.

    The clock is the CPU time of this thread, so a busy machine does not shift one-thread ratios.

    Raises:
        AssertionError: if a ratio is below its aim, on full shapes.
    """
    case = benchmark.name.removeprefix("test_")
    seconds = best_seconds(
        {"ours": ours} | {name: run for name, (run, _) in baselines.items()}, clock
    )
    for name, (_, aim) in baselines.items():
        ratio = seconds[name] / max(seconds["ours"], 1e-9)
        RATIOS.append(Ratio(case, name, seconds["ours"] / elements * 1e9, ratio, aim))
        benchmark.extra_info[f"ratio to {name}"] = round(ratio, 2)
    benchmark.extra_info["ns per element"] = round(seconds["ours"] / elements * 1e9, 4)
    benchmark.pedantic(ours, rounds=ROUNDS, warmup_rounds=1)
    if not TINY:
        for line in RATIOS[-len(baselines) :]:
            assert line.aim is None or line.ratio >= line.aim, str(line)


def machine() -> dict[str, str]:
    """What a reader needs to believe or repeat a number, besides what pytest-benchmark records."""
    names = [
        line.partition(":")[2].strip()
        for line in _lines(Path("/proc/cpuinfo"))
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": str(os.cpu_count()),
        "torch": torch.__version__,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []

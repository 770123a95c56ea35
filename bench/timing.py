"""Times of one run: median, 20th and 80th percentile."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dfq_kernels import _backend

Run = Callable[[], object]
QUANTILES = (0.5, 0.2, 0.8)


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: half, a fifth and four fifths of the runs took no longer."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Subject:
    """Something to be timed, and the backend that our ops take meanwhile, if it is ours."""

    run: Run
    backend: str | None = None

    def times(self, timer: Callable[[Run], list[float]]) -> list[float]:
        """What ``timer`` makes of ``run``."""
        if self.backend is None:
            return timer(self.run)
        with _backend.use(self.backend):
            return timer(self.run)


def summarize(seconds: Sequence[float]) -> Timing:
    """The quantiles of some measured times."""
    values = torch.tensor(seconds, dtype=torch.float64)
    return Timing(*values.quantile(values.new_tensor(QUANTILES)).tolist())


def on_cpu(
    subjects: dict[str, Subject], *, threads: int = 1, turns: int = 15, runs: int = 2
) -> dict[str, Timing]:
    """Time each subject in turns, so that all see the same machine.

    A turn is some runs and one before them, not timed, that brings the data back into the caches.
    The clock of one thread is its CPU time, which a busy machine does not shift; that of several is
    the wall's.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter

    def turn(run: Run) -> list[float]:
        run()
        times = []
        for _ in range(runs):
            start = clock()
            run()
            times.append(clock() - start)
        return times

    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(turns):
        for name, subject in subjects.items():
            samples[name] += subject.times(turn)
    return {name: summarize(times) for name, times in samples.items()}


def on_gpu(subject: Subject) -> Timing:
    """Time one subject by CUDA events, its data not in the L2 cache; ``do_bench`` warms up first.

    Raises:
        RuntimeError: if triton, whose ``do_bench`` it is, is not installed.
    """
    try:
        from triton.testing import do_bench
    except ImportError as error:
        raise RuntimeError("timing on a GPU takes triton; install triton.") from error
    milliseconds = subject.times(lambda run: do_bench(run, quantiles=list(QUANTILES)))
    return Timing(*(value / 1e3 for value in milliseconds))

"""Times of one run, and the memory it needs: what ``dfq bench`` and the benches measure with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

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


def captured(run: Run) -> Run:
    """``run`` on the GPU as a CUDA graph: one launch for all of its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever happens in a first run must not be captured
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def resident_bytes() -> int | None:
    """Memory of this process that lies in the machine's; None where Linux does not tell."""
    return _status("VmRSS")


def peak_bytes(run: Run) -> int | None:
    """The most that ``resident_bytes`` was during ``run``; None where Linux does not tell."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew, from what is now
        run()
        return _status("VmHWM")
    return None


def _status(field: str) -> int | None:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None

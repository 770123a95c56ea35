"""``python -m bench.gpu_day --out DIR``: everything there is to learn on a GPU, in ten minutes.

It builds csrc, measures what the GPU can do, runs the tests that need one and every bench, and
looks for bad memory accesses. Each stage is a process of its own with its own time limit; one that
fails is told of at the end (exit code 1), and the day goes on. In DIR:

    summary.md      the tables; written anew after every stage
    stages.jsonl    how each stage ended, and what the machine has
    roof.jsonl      copy bandwidth and matrix products
    <op>.jsonl      the records of bench/bench_<op>.py
    log.txt         all output

An op joins by having a bench/bench_<op>.py, and tests marked ``gpu`` in tests/kernels/test_gpu*.py.
``--dry-run`` runs the same stages without a GPU, on tiny shapes on the CPU (Triton in its
interpreter): nothing is measured.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.stages import Result, Stage, machine, plan, run
from bench.summary import summary

MINUTES = 9.5  # of a session of ten


def main(argv: Sequence[str] | None = None) -> int:
    """Run the day; 1 if a stage failed."""
    flags = _flags(argv)
    if not flags.dry_run and not torch.cuda.is_available():
        print("torch finds no CUDA device; --dry-run runs every stage without one.")
        return 1
    out = flags.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for stale in (*out.glob("*.jsonl"), out / "log.txt"):
        stale.unlink(missing_ok=True)
    given = {"commit": flags.commit, "dirty": None} if flags.commit else {}
    found = machine() | given | {"dry_run": flags.dry_run}
    record.append(out / "stages.jsonl", found)
    write = functools.partial(_write, out, found)
    stages = plan(out, dry_run=flags.dry_run, commit=flags.commit)
    results = _run_all(stages, out, flags.minutes * 60, write)
    print(write(results))
    return 0 if all(result.ended in ("passed", "skipped") for result in results) else 1


def _flags(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="a folder; its records are replaced"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--commit", default="", help="of a copy of the sources without .git")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all of it")
    return parser.parse_args(argv)


def _run_all(
    stages: Sequence[Stage], out: Path, seconds: float, write: Callable[[list[Result]], str]
) -> list[Result]:
    """Run the stages while the time lasts; what is known so far is always on the disk."""
    results: list[Result] = []
    end = time.monotonic() + seconds
    for stage in stages:
        result = run(stage, out / "log.txt", min(stage.seconds, end - time.monotonic()))
        print(result, flush=True)
        record.append(out / "stages.jsonl", result.record())
        results.append(result)
        write(results)
    return results


def _write(out: Path, found: dict[str, Any], results: list[Result]) -> str:
    text = summary(found, results, list(record.read(out)))
    (out / "summary.md").write_text(text)
    return text


if __name__ == "__main__":
    sys.exit(main())

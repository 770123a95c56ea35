"""The stages of the GPU day: what is run, for how long, and how it ended."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import record
from bench.settings import ROOT

TOOLS = {  # what the day uses: what is lost without it
    "pytest": "no test and no bench runs",
    "pytest_benchmark": "nothing: the records are ours",
    "xdist": "tests run one after another",
    "triton": "no Triton kernel runs, and nothing is timed on the GPU",
    "pybind11": "the tests of csrc/core are not built",
    "nvcc": "csrc/cuda is not compiled; libraries that are there are used",
    "ninja": "csrc is compiled one file after another",
    "compute-sanitizer": "memory accesses are not checked",
}
PROGRAMS = ("nvcc", "ninja", "compute-sanitizer")
DRY_RUN = {  # instead of the GPU, which is hidden if there is one
    "CUDA_VISIBLE_DEVICES": "",
    "DFQ_BENCH": "tiny",
    "DFQ_BENCH_DEVICE": "cpu",
    "DFQ_DRY_RUN": "1",
    "TRITON_INTERPRET": "1",
    "PYTEST_PLUGINS": "tests.kernels.as_a_gpu",
}
# others may be using the libraries, so a dry run only says what it would compile
DRY_BUILD = "from dfq_kernels import build; print([one.name for one in build.plan()[0]], 'planned')"


@dataclass(frozen=True)
class Stage:
    """A command and the seconds it may take; with ``missing``, why it cannot run at all."""

    name: str
    command: tuple[str, ...]
    seconds: float
    env: Mapping[str, str] = field(default_factory=dict)
    missing: str = ""
    optional: bool = False  # without what is missing the day is still good


@dataclass(frozen=True)
class Result:
    """How a stage ended: passed, failed, timed out, skipped, or no time left for it."""

    stage: str
    ended: str
    seconds: float
    detail: str  # the last line of its output, or the reason

    def __str__(self) -> str:
        return f"{self.stage:28s} {self.ended:12s} {self.seconds:6.1f} s  {self.detail}"

    def record(self) -> dict[str, Any]:
        """The line for stages.jsonl."""
        return {"kind": "stage"} | asdict(self)


def plan(out: Path, *, dry_run: bool, commit: str = "") -> list[Stage]:
    """Every stage, in order of importance: the time may not last for all."""
    env = DRY_RUN if dry_run else {"DFQ_BENCH_DEVICE": "cuda"}
    env = {**env, "DFQ_BENCH_COMMIT": commit} if commit else env
    python = sys.executable
    build = ("-c", DRY_BUILD) if dry_run else ("-m", "dfq_kernels.build")
    return [
        Stage("build", (python, *build), 150),
        Stage("roof", (python, "-m", "bench.roof"), 60, env | _recorded(out / "roof.jsonl")),
        Stage("tests", _tests(dry_run), 150, env, _no_pytest()),
        *(
            Stage(
                path.stem,
                _pytest(path.relative_to(ROOT).as_posix()),
                200,
                env | _recorded(out / f"{path.stem.removeprefix('bench_')}.jsonl"),
                _no_pytest(),
            )
            for path in benches()
        ),
        *(_sanitizer(tool, env, dry_run=dry_run) for tool in ("memcheck", "racecheck")),
    ]


def benches() -> list[Path]:
    """What pytest runs: all but bench_methods, which takes hours and no kernel of its own."""
    found = (ROOT / "bench").glob("bench_*.py")
    return sorted(path for path in found if path.stem != "bench_methods")


def run(stage: Stage, log: Path, seconds: float) -> Result:
    """Run one stage for at most ``seconds``; its output goes to the end of ``log``."""
    if stage.missing:
        return Result(stage.name, "skipped" if stage.optional else "failed", 0.0, stage.missing)
    if seconds <= 1:
        return Result(stage.name, "no time", 0.0, "the stages before it took all of it")
    start = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n")
        file.flush()
        began = file.tell()
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env={**os.environ, **stage.env},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it started ends with it
        )
        try:
            code = process.wait(seconds)
            ended = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            ended, code = "timed out", None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    detail = _last_line(log, began)
    if code:
        detail = f"exit code {code}: {detail}"
    return Result(stage.name, ended, round(time.monotonic() - start, 1), detail)


def machine() -> dict[str, Any]:
    """What the machine has, and for each thing it lacks what that costs."""
    missing = {tool: loss for tool, loss in TOOLS.items() if not _has(tool)}
    return {
        "kind": "machine",
        **record.circumstances(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "missing": missing,
    }


def _has(tool: str) -> bool:
    if tool in PROGRAMS:
        return shutil.which(tool) is not None or Path(f"/usr/local/cuda/bin/{tool}").exists()
    return importlib.util.find_spec(tool) is not None


def _no_pytest() -> str:
    return "" if _has("pytest") else "pytest is not installed"


def _pytest(*arguments: str) -> tuple[str, ...]:
    # pyproject.toml's options name pytest-benchmark, and pytest refuses what it does not know
    options = () if _has("pytest_benchmark") else ("-o", "addopts=--strict-markers")
    return (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *arguments)


def _tests(dry_run: bool, *arguments: str) -> tuple[str, ...]:
    files = sorted(
        path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/kernels/test_gpu*.py")
    )
    together = ("-n", "6") if _has("xdist") and not (dry_run or arguments) else ()
    return _pytest("-m", "gpu", *together, *arguments, *files)


def _recorded(path: Path) -> dict[str, str]:
    return {"DFQ_BENCH_RECORD": str(path)}


def _sanitizer(tool: str, env: Mapping[str, str], *, dry_run: bool) -> Stage:
    """NVIDIA's checker around the tests of small shapes; a dry run only looks for those tests."""
    if dry_run:
        again = "it finds the tests that memcheck finds" if tool != "memcheck" else ""
        tests = _tests(dry_run, "-k", "small_shapes", "--collect-only")
        return Stage(tool, tests, 60, env, again, optional=True)
    tests = _tests(dry_run, "-k", "small_shapes")
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [program, "--tool", tool, "--target-processes", "application-only"]
    command += ["--error-exitcode", "99", *tests]
    env = {**env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor its own allocation
    missing = "" if _has("compute-sanitizer") else "compute-sanitizer is not installed"
    return Stage(tool, tuple(command), 80, env, missing, optional=True)


def _last_line(log: Path, began: int) -> str:
    with log.open(errors="replace") as file:
        file.seek(began)
        lines = [line.strip() for line in file if line.strip()]
    return lines[-1][:200] if lines else "no output"


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()

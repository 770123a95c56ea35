"""Every bench runs on tiny shapes: the GPU day without a GPU. The README is what was measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import record, report, stages
from dfq_kernels import _backend

ROOT = Path(__file__).parents[1]
BENCHES = [path.stem for path in stages.benches()]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """The process, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("day")
    command = [sys.executable, "-m", "bench.gpu_day", "--dry-run", "--out", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False), out


def test_every_stage_passes_without_a_gpu(dry_run):
    done, out = dry_run
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}{done.stderr}{log[-20_000:]}"
    ended = {r["stage"]: r["ended"] for r in record.read(out) if r["kind"] == "stage"}
    expected = ["build", "roof", "tests", *BENCHES, "memcheck", "racecheck"]
    assert ended == dict.fromkeys(expected, "passed") | {"racecheck": "skipped"}


def test_no_figure_of_a_dry_run_is_shown(dry_run):
    done, out = dry_run
    assert "nothing was measured on a GPU" in done.stdout
    assert not re.search(r"\d (us|GB/s|Top/s)|\dx ", done.stdout)
    records = [r for r in record.read(out) if r["kind"] in ("bench", "roof")]
    assert records
    assert all(r["tiny"] and r["device"] == "cpu" for r in records)


@pytest.mark.parametrize("bench", BENCHES)
def test_every_bench_measures_every_backend(dry_run, bench, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    op = bench.removeprefix("bench_")
    records = [json.loads(line) for line in (dry_run[1] / f"{op}.jsonl").read_text().splitlines()]
    assert records
    there = {name for name in ("compiled", "triton") if _backend.variant(op, name, "cpu")}
    assert there <= {r["backend"] for r in records}


def test_the_readme_is_what_was_measured():
    assert report.main(["--check"]) == 0

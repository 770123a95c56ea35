"""Every bench runs once on tiny shapes, so that none rots."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "bench").glob("bench_*.py"))


@pytest.mark.parametrize("bench", BENCHES)
def test_bench_runs(bench):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", bench],
        cwd=ROOT,
        env={**os.environ, "DFQ_BENCH": "tiny"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ns/element" in done.stdout  # it compared something

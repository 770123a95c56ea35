"""Importing is free: no CUDA, no triton, no build, no print."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout + done.stderr


def test_importing_is_free():
    code = "import sys, torch, dfq, dfq.methods, dfq.pipeline, dfq_kernels\n"
    code += "assert not torch.cuda.is_initialized(); assert 'triton' not in sys.modules"
    assert _run(code) == ""


def test_dfq_imports_without_torch():
    code = "import sys; sys.modules['torch'] = None\n"
    code += "import dfq, dfq.cli; assert dfq.DataSpec(shape=(3, 8, 8), classes=2)"
    assert _run(code) == ""

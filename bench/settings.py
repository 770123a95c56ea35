"""What the environment asks of the benches.

DFQ_BENCH=tiny          every case once, on tiny shapes, no aim asserted: the test suite does
DFQ_BENCH_DEVICE=cuda   measure on the GPU instead of the CPU
DFQ_BENCH_RECORD=FILE   write every comparison to FILE, anew, as JSON lines
DFQ_BENCH_COMMIT=HASH   the commit of a copy of the sources that has no .git
"""

import os
from pathlib import Path

TINY = os.environ.get("DFQ_BENCH") == "tiny"
DEVICE = os.environ.get("DFQ_BENCH_DEVICE", "cpu")
RECORD = Path(os.environ["DFQ_BENCH_RECORD"]) if os.environ.get("DFQ_BENCH_RECORD") else None
COMMIT = os.environ.get("DFQ_BENCH_COMMIT", "")
ROOT = Path(__file__).resolve().parents[1]

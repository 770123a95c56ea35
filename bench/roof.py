"""What the GPU can do at most: ``python -m bench.roof`` measures copies and matrix products.

``DFQ_BENCH_DEVICE``, ``DFQ_BENCH`` and ``DFQ_BENCH_RECORD`` are those of the benches.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from bench import record
from bench.settings import DEVICE, TINY
from dfq.deploy.measure import Run, Subject, Timing, on_cpu, on_gpu

COPIED = 2**12 if TINY else 2**30  # bytes: many times the L2 cache of any GPU
SIDE = 64 if TINY else 8192


@dataclass(frozen=True)
class Roof:
    """One measured limit; ``unit`` is GB/s or Top/s, an operation being a multiply or an add."""

    kind: str
    what: str
    size: str
    rate: float
    unit: str
    us: float
    us_p20: float
    us_p80: float

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Roof:
        """From its record, which says more."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    def __str__(self) -> str:
        return f"{self.what:20s} {self.size:20s} {self.us:9.1f} us {self.rate:8.1f} {self.unit}"


@functools.cache
def copy_gb_per_s() -> float:
    """Bytes read and written a nanosecond by a large copy within the device's memory."""
    return _copy().rate


def measure() -> list[Roof]:
    """Every limit of the device."""
    return [_copy(), _matmul("bf16 matmul"), _matmul("int8 matmul")]


def _copy() -> Roof:
    source = torch.randn(COPIED // 4, device=DEVICE)
    target = torch.empty_like(source)
    timing = _time(lambda: target.copy_(source))
    return _roof("copy", f"{COPIED} bytes", 2 * COPIED, timing)


def _matmul(what: str) -> Roof:
    a, b = (torch.randn(SIDE, SIDE, device=DEVICE) for _ in range(2))
    if what == "bf16 matmul":
        a, b = a.bfloat16(), b.bfloat16()
        timing = _time(lambda: a @ b)
    else:
        a, b = ((t * 40).clamp(-128, 127).to(torch.int8) for t in (a, b))
        timing = _time(lambda: torch._int_mm(a, b.t()))  # both with the summed dimension fastest
    return _roof(what, f"{SIDE} x {SIDE} x {SIDE}", 2 * SIDE**3, timing)


def _time(run: Run) -> Timing:
    if DEVICE == "cuda":
        return on_gpu(Subject(run))
    return on_cpu({"": Subject(run)}, turns=1)[""]


def _roof(what: str, size: str, amount: int, timing: Timing) -> Roof:
    unit, scale = ("GB/s", 1e9) if what == "copy" else ("Top/s", 1e12)
    rate = round(amount / max(timing.median, 1e-9) / scale, 2)
    times = (round(seconds * 1e6, 3) for seconds in (timing.median, timing.p20, timing.p80))
    return Roof("roof", what, size, rate, unit, *times)


def main() -> int:
    """Measure, print, and record."""
    record.start()
    for roof in measure():
        record.write(asdict(roof) | {"device": DEVICE})
        print(roof)
    print("measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Check, then measure. No figure without its gate, its baselines in the same run, and the machine.

A bench describes a ``Case`` and hands it to the fixture ``measure``:

    def test_forward(measure):
        x = torch.randn(SHAPE, device=DEVICE)
        measure(Case(op="fake_quantize", name="forward", size=describe(x), ...))

On the CPU the implementation that runs there is measured, on the GPU every one that is there, each
in its own row. ``bench.settings`` has the switches, ``bench.record`` what is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench import record, roof
from bench.row import Row
from bench.settings import DEVICE, TINY
from dfq.deploy.measure import Run, Subject, Timing, on_cpu, on_gpu
from dfq_kernels import _backend

TURNS = {"turns": 1, "runs": 1} if TINY else {}
LARGE = 2 * 64e6  # bytes read and written; what aims at a GPU counts from here on
OF_COPY_AIM = 0.85  # of the GPU's copy bandwidth
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
T = TypeVar("T")


@dataclass(frozen=True)
class Baseline:
    """Something else that does the same, and how many times faster we want to be."""

    run: Run
    aim: float | None = None  # on a CPU; None: only recorded
    gpu_aim: float | None = None  # on a GPU, from ``LARGE`` on
    backend: str | None = None  # that our ops take in it, if it calls any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One thing to measure."""

    op: str  # as dfq_kernels/_backend.py knows it, or what a bench of several ops is called
    name: str  # for the reader of the table
    size: str  # of the input: describe(x)
    run: Run  # must ask _backend for its implementation at each call, as public functions do
    check: Callable[[], None]  # the gate: AssertionError if the result is wrong
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    elements: int
    bytes: int | None = None  # that must be read and written at least
    threads: int = 1  # of a CPU
    ops: tuple[str, ...] = ()  # that a backend must have to take part; none: ``op``
    extra: Mapping[str, Any] = field(default_factory=dict)  # more to record


ROWS: list[Row] = []


def choose(*, tiny: T, usual: T, large: T | None = None) -> list[T]:
    """The sizes to measure: the usual, and on a GPU the large beside it."""
    if TINY:
        return [tiny]
    return [usual] if DEVICE == "cpu" or large is None else [usual, large]


def run_op(op: str, *args: Any) -> Any:
    """``op`` by whichever backend is in force."""
    return _backend.implementation(op, DEVICE)(*args)


def compiled(function: Callable[..., T]) -> Callable[..., T]:
    """``torch.compile`` for just the shapes it is called with."""
    torch.compiler.reset()  # what it compiled before would count towards its limit of 8
    backend = "eager" if TINY else "inductor"
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)


def against_compile(
    x: Tensor, function: Callable[..., Any], run: Callable[[Callable[..., Any]], Run]
) -> dict[str, Baseline]:
    """The baseline torch.compile, where it is worth the time that compiling takes.

    ``run`` makes a run of the compiled function. On a CPU float32 alone is measured, on a GPU
    float32 and bfloat16 of the large sizes.
    """
    worth = x.dtype == torch.float32
    if DEVICE == "cuda":
        worth = x.dtype != torch.float16 and x.nbytes >= LARGE / 2
    return {"torch.compile": Baseline(run(compiled(function)), gpu_aim=1.1)} if worth else {}


def describe(x: Tensor) -> str:
    """Shape, dtype and, if it matters, memory layout."""
    layout = ""
    if x.ndim == 4:
        layout = " NCHW" if x.is_contiguous() else " channels_last"
    return f"{'x'.join(map(str, x.shape))} {DTYPES[x.dtype]}{layout}"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's number of threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(case: Case, benchmark: Any = None) -> list[Row]:
    """Check ``case``, time it beside its baselines, and record a row for each pair.

    ``benchmark`` is the fixture of pytest-benchmark, if that is installed: it gets the rows too.

    Raises:
        AssertionError: if a result is wrong (what passed is measured all the same), or if, on
            the CPU and on full shapes, a ratio is below its aim.
    """
    with threads(case.threads):
        right, wrong = _gate(case)
        rows = []
        if right:
            times = _time(case, right)
            rows = [row for backend in right for row in _rows(case, backend, times)]
        for row in rows:
            ROWS.append(row)
            record.write(asdict(row) | dict(case.extra))
        if benchmark is not None and right:
            _tell(benchmark, case, right[0], rows)
    assert not wrong, f"{case.op}, {case.name}, {case.size} is wrong: " + "; ".join(wrong)
    if DEVICE == "cpu" and not TINY:
        assert not any(row.missed for row in rows), "; ".join(str(r) for r in rows if r.missed)
    return rows


def _gate(case: Case) -> tuple[list[str], list[str]]:
    """The backends that pass, and for the others what is wrong.

    On a CPU what runs there is asked, on a GPU and in the interpreter all there is; the reference
    where there is nothing else. ``DFQ_BACKEND`` forces one.
    """
    forced = os.environ.get("DFQ_BACKEND")
    right, wrong = [], []
    for backend in [forced] if forced else ["compiled", "triton", "reference"]:
        if backend == "reference" and not forced and (right or wrong):
            break
        try:  # one that does not load or compile must not hide the other
            if all(_backend.variant(op, backend, DEVICE) for op in case.ops or (case.op,)):
                with _backend.use(backend):
                    case.check()
                right.append(backend)
        except Exception as error:
            wrong.append(f"{backend}: {type(error).__name__}: {error}")
    return right, wrong


def _time(case: Case, backends: list[str]) -> dict[str, Timing]:
    """By backend or name of the baseline; without the baselines that do not run on a GPU."""
    ours = {name: Subject(case.run, name) for name in backends}
    others = {name: Subject(one.run, one.backend) for name, one in case.baselines.items()}
    if DEVICE == "cpu":
        return on_cpu(ours | others, threads=case.threads, **TURNS)
    times = {name: on_gpu(subject) for name, subject in ours.items()}
    for name, subject in others.items():
        try:
            times[name] = on_gpu(subject)
        except RuntimeError as error:
            print(f"{case.op}, {case.name}, {case.size}: no time of {name}: {error}")
    return times


def _rows(case: Case, backend: str, times: dict[str, Timing]) -> list[Row]:
    seconds = max(times[backend].median, 1e-9)
    rate = None if case.bytes is None else case.bytes / seconds / 1e9
    large = DEVICE == "cuda" and case.bytes is not None and case.bytes >= LARGE
    of_copy = None if rate is None or DEVICE == "cpu" else rate / roof.copy_gb_per_s()
    us, us_p20, us_p80 = (round(value * 1e6, 3) for value in astuple(times[backend]))
    alone = Row(
        op=case.op,
        ops=case.ops or (case.op,),
        case=case.name,
        size=case.size,
        backend=backend,
        device=DEVICE,
        threads=case.threads,
        us=us,
        us_p20=us_p20,
        us_p80=us_p80,
        ns_per_element=round(seconds / case.elements * 1e9, 5),
        gb_per_s=None if rate is None else round(rate, 1),
        of_copy_bandwidth=None if of_copy is None else round(of_copy, 3),
        of_copy_aim=OF_COPY_AIM if large else None,
    )

    def against(name: str, baseline: Baseline) -> Row:
        median = times[name].median
        return replace(
            alone,
            baseline=name,
            baseline_us=round(median * 1e6, 3),
            ratio=round(median / seconds, 3),
            aim=baseline.aim if DEVICE == "cpu" else baseline.gpu_aim if large else None,
        )

    timed = [pair for pair in case.baselines.items() if pair[0] in times]
    return [against(*pair) for pair in timed] or [alone]


def _tell(benchmark: Any, case: Case, backend: str, rows: list[Row]) -> None:
    """Let pytest-benchmark measure too, by the wall, and keep our rows in its record."""

    def run() -> None:
        case.run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info["rows"] = [asdict(row) for row in rows]
    with _backend.use(backend):
        benchmark.pedantic(run, rounds=1 if TINY else 5, warmup_rounds=1)

"""The harness: the gate before the clock, what a row holds, what is written."""

import json
import sys
import types
from dataclasses import asdict

import pytest
import torch

from bench import conftest, harness, record, roof
from bench.harness import Baseline, Case
from bench.row import Row
from dfq.deploy import measure as timing
from dfq.deploy.measure import Timing
from dfq_kernels import _backend


@pytest.fixture(autouse=True)
def _apart(monkeypatch, tmp_path):
    """Rows and records of these tests alone."""
    monkeypatch.setattr(harness, "ROWS", [])
    monkeypatch.setattr(record, "RECORD", tmp_path / "some" / "records.jsonl")
    monkeypatch.setattr(harness, "TURNS", {"turns": 1, "runs": 1})
    monkeypatch.setattr(harness, "TINY", True)
    record.start()


def _lines():
    return [json.loads(line) for line in record.RECORD.read_text().splitlines()]


def _implementations(monkeypatch, **functions):
    """Pretend that op ``double`` has just these backends."""

    def variant(op, backend, device):
        return functions.get(backend)

    monkeypatch.setattr(_backend, "variant", variant)


def _case(**changes):
    x = torch.ones(8)

    def check():
        assert harness.run_op("double", x) == 2

    fields = {
        "op": "double",
        "name": "forward",
        "size": "8 fp32",
        "run": lambda: harness.run_op("double", x),
        "check": check,
        "elements": 8,
        "bytes": 64,
    }
    return Case(**{**fields, **changes})


def test_a_wrong_result_gets_no_figure(monkeypatch):
    _implementations(monkeypatch, compiled=lambda x: 3)
    with pytest.raises(AssertionError, match="double, forward, 8 fp32 is wrong: compiled: Assert"):
        harness.measure(_case())
    assert not harness.ROWS
    assert not _lines()


def test_a_wrong_backend_does_not_hide_the_right_one(monkeypatch):
    def broken(x):
        raise RuntimeError("does not compile")

    _implementations(monkeypatch, compiled=broken, triton=lambda x: 2)
    with pytest.raises(AssertionError, match="compiled: RuntimeError: does not compile"):
        harness.measure(_case())
    assert [(line["backend"], line["ratio"]) for line in _lines()] == [("triton", None)]


@pytest.mark.parametrize(
    ("there", "measured"),
    [
        (["compiled", "triton", "reference"], ["compiled", "triton"]),
        (["triton", "reference"], ["triton"]),
        (["reference"], ["reference"]),
    ],
)
def test_measures_every_backend_but_the_reference(monkeypatch, there, measured):
    _implementations(monkeypatch, **dict.fromkeys(there, lambda x: 2))
    rows = harness.measure(_case(baselines={"a": Baseline(int), "b": Baseline(int)}))
    assert [(r.backend, r.baseline) for r in rows] == [(m, b) for m in measured for b in "ab"]


def test_our_op_in_a_baseline_takes_the_backend_it_is_given(monkeypatch):
    seen = []
    _implementations(monkeypatch, compiled=lambda x: 2, reference=lambda x: seen.append(x) or 2)
    run = _case().run
    harness.measure(_case(baselines={"reference": Baseline(run, backend="reference")}))
    assert len(seen) == 2  # one to warm up, one timed


def test_a_record_has_the_row_and_its_circumstances(monkeypatch):
    _implementations(monkeypatch, compiled=lambda x: 2)
    (row,) = harness.measure(_case(extra={"share": 0.5}, baselines={"sum": Baseline(int, 3.0)}))
    (line,) = _lines()
    expected = {**asdict(row), "share": 0.5, **record.circumstances(), "ops": ["double"]}
    assert line == expected
    assert set(record.circumstances()) == {
        *("commit", "dirty", "date", "torch", "triton", "python", "processor", "cores", "isa"),
        *("gpu", "load", "tiny"),
    }
    record.start()
    assert not _lines()  # the file is begun anew


TIMES = {
    "compiled": Timing(median=2e-6, p20=1.5e-6, p80=4e-6),
    "ATen": Timing(median=5e-6, p20=5e-6, p80=5e-6),
}
ON_CPU = Row(
    op="double",
    ops=("double",),
    case="forward",
    size="8 fp32",
    backend="compiled",
    device="cpu",
    threads=1,
    us=2.0,
    us_p20=1.5,
    us_p80=4.0,
    ns_per_element=250.0,
    gb_per_s=0.0,
    of_copy_bandwidth=None,
    of_copy_aim=None,
    baseline="ATen",
    baseline_us=5.0,
    ratio=2.5,
    aim=4.0,
)


def test_row_on_a_cpu():
    case = _case(baselines={"ATen": Baseline(int, aim=4.0, gpu_aim=2.0)})
    (row,) = harness._rows(case, "compiled", TIMES)
    assert row == ON_CPU
    assert row.missed
    assert str(row) == (
        "double, forward, 8 fp32, compiled: 2.0 us, 250.0000 ns/element 2.50x ATen, aim 4"
    )


@pytest.mark.parametrize(
    ("moved", "share", "aims"), [(128_000_000, 0.8, (0.85, 2.0)), (1_000_000, 0.006, (None, None))]
)
def test_row_on_a_gpu_has_aims_from_64_mb_on(monkeypatch, moved, share, aims):
    monkeypatch.setattr(harness, "DEVICE", "cuda")
    monkeypatch.setattr(roof, "copy_gb_per_s", lambda: 80_000.0)
    case = _case(bytes=moved, baselines={"ATen": Baseline(int, aim=4.0, gpu_aim=2.0)})
    (row,) = harness._rows(case, "compiled", TIMES)
    assert (row.gb_per_s, row.of_copy_bandwidth) == (moved / 2e-6 / 1e9, share)
    assert (row.of_copy_aim, row.aim) == aims


def test_a_missed_aim_fails_on_the_cpu_once_all_is_recorded(monkeypatch):
    monkeypatch.setattr(harness, "TINY", False)
    _implementations(monkeypatch, compiled=lambda x: 2)
    with pytest.raises(AssertionError, match=r"x nothing, aim 1e\+09$"):
        harness.measure(_case(baselines={"nothing": Baseline(int, aim=1e9)}))
    assert len(_lines()) == 1


def test_a_baseline_that_does_not_run_on_the_gpu_costs_only_itself(monkeypatch, capsys):
    def fails(subject):
        if subject.backend is None:
            raise RuntimeError("not implemented for 'Half'")
        return TIMES["compiled"]

    monkeypatch.setattr(harness, "DEVICE", "cuda")
    monkeypatch.setattr(harness, "on_gpu", fails)
    times = harness._time(_case(baselines={"ATen": Baseline(int)}), ["compiled"])
    assert times == {"compiled": TIMES["compiled"]}
    assert "no time of ATen: not implemented for 'Half'" in capsys.readouterr().out


def test_times_on_a_gpu_are_those_of_do_bench(monkeypatch):
    def do_bench(run, quantiles):
        return [{0.2: 1.0, 0.5: run(), 0.8: 3.0}[quantile] for quantile in quantiles]  # ms

    testing = types.SimpleNamespace(do_bench=do_bench)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(testing=testing))
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    assert timing.on_gpu(timing.Subject(lambda: 2.0)) == Timing(0.002, 0.001, 0.003)
    monkeypatch.setitem(sys.modules, "triton.testing", None)
    with pytest.raises(RuntimeError, match="takes triton; install triton"):
        timing.on_gpu(timing.Subject(int))


@pytest.mark.parametrize(
    ("device", "reason"), [("gpu", "must be cpu or cuda"), ("cuda", "finds no")]
)
def test_a_device_that_is_not_there(monkeypatch, device, reason):
    monkeypatch.setattr(conftest, "DEVICE", device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.UsageError, match=reason):
        conftest.pytest_configure(None)


def test_half_a_line_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": ')
    assert list(record.read(tmp_path)) == [{"a": 1}]


def test_quantiles():
    assert timing.summarize([3.0, 1.0, 2.0, 6.0, 4.0, 5.0]) == Timing(3.5, 2.0, 5.0)


def test_a_turn_times_all_but_its_first_run():
    calls = {"a": 0, "b": 0}
    order = []

    def run(name):
        calls[name] += 1
        order.append(name)

    subjects = {name: timing.Subject(lambda name=name: run(name)) for name in calls}
    timing.on_cpu(subjects, turns=2, runs=3)
    assert order == [*"aaaabbbb"] * 2


@pytest.mark.parametrize(
    ("x", "described"),
    [
        (torch.empty(2, 3, 4, 5), "2x3x4x5 fp32 NCHW"),
        (
            torch.empty(2, 3, 4, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last),
            "2x3x4x5 bf16 channels_last",
        ),
        (torch.empty(7).half(), "7 fp16"),
    ],
)
def test_describes_an_input(x, described):
    assert harness.describe(x) == described

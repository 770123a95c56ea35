"""The GPU day: which stages there are, and that one that fails does not end it."""

import json
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_day, stages
from bench.stages import Result, Stage


def _python(name, code, seconds=30.0, **fields):
    return Stage(name, (sys.executable, "-c", code), seconds, **fields)


def _records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def _root(monkeypatch, tmp_path, *files):
    for file in files:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(stages, "ROOT", tmp_path)


def test_a_bench_joins_by_existing(monkeypatch, tmp_path):
    gpu_tests = "tests/kernels/test_gpu_new.py"
    _root(monkeypatch, tmp_path, "bench/bench_new.py", "bench/harness.py", gpu_tests)
    plan = {stage.name: stage for stage in stages.plan(tmp_path / "out", dry_run=False)}
    assert list(plan) == ["build", "roof", "tests", "bench_new", "memcheck", "racecheck"]
    bench = plan["bench_new"]
    assert bench.command[-1] == "bench/bench_new.py"
    assert bench.env == {
        "DFQ_BENCH_DEVICE": "cuda",
        "DFQ_BENCH_RECORD": str(tmp_path / "out" / "new.jsonl"),
    }
    assert plan["tests"].command[-1] == gpu_tests
    assert plan["build"].command[1:] == ("-m", "dfq_kernels.build")


def test_fits_into_ten_minutes():
    assert gpu_day.MINUTES < 10


def test_without_its_tools(monkeypatch, tmp_path):
    _root(monkeypatch, tmp_path, "bench/bench_new.py")
    monkeypatch.setattr(stages, "_has", lambda tool: False)
    results = [
        stages.run(stage, tmp_path / "log", 30)
        for stage in stages.plan(tmp_path, dry_run=False)
        if stage.missing
    ]
    assert [(r.stage, r.ended, r.detail) for r in results] == [
        ("tests", "failed", "pytest is not installed"),
        ("bench_new", "failed", "pytest is not installed"),
        ("memcheck", "skipped", "compute-sanitizer is not installed"),
        ("racecheck", "skipped", "compute-sanitizer is not installed"),
    ]
    assert set(stages.machine()["missing"]) == set(stages.TOOLS)


def test_without_pytest_benchmark_its_option_is_not_given(monkeypatch, tmp_path):
    _root(monkeypatch, tmp_path, "bench/bench_new.py")
    monkeypatch.setattr(stages, "_has", lambda tool: tool != "pytest_benchmark")
    bench = next(s for s in stages.plan(tmp_path, dry_run=False) if s.name == "bench_new")
    assert bench.command[-3:-1] == ("-o", "addopts=--strict-markers")


def test_how_stages_end(tmp_path):
    log = tmp_path / "log.txt"
    good = stages.run(_python("good", "print('one'); print('two')"), log, 30)
    assert (good.ended, good.detail) == ("passed", "two")
    bad = stages.run(_python("bad", "import sys; sys.exit('a reason')"), log, 30)
    assert (bad.ended, bad.detail) == ("failed", "exit code 1: a reason")
    late = stages.run(_python("late", "pass"), log, 0.5)
    assert (late.ended, late.seconds) == ("no time", 0.0)
    text = log.read_text()
    assert text.index("===== good") < text.index("two") < text.index("===== bad")


def test_what_takes_too_long_ends_with_all_that_it_started(tmp_path):
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', "
    child += "'import time; time.sleep(60)']); print(p.pid, flush=True); time.sleep(60)"
    result = stages.run(_python("slow", child), tmp_path / "log", 3)
    assert result.ended == "timed out"
    assert result.seconds < 20
    status = Path(f"/proc/{result.detail}/stat")
    for _ in range(50):
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the process it started still runs")


@pytest.fixture
def day(monkeypatch, tmp_path):
    """Runs these stages as a dry day; gives its exit code, and its folder."""
    out = tmp_path / "out"

    def run(*planned):
        monkeypatch.setattr(gpu_day, "plan", lambda out, **_: list(planned))
        return gpu_day.main(["--out", str(out), "--dry-run"]), out

    return run


def test_a_failing_stage_is_told_of_and_the_day_goes_on(day, capsys):
    code, out = day(_python("first", "raise SystemExit('broken')"), _python("second", "print(2)"))
    assert code == 1
    machine, *ended = _records(out / "stages.jsonl")
    assert machine["kind"] == "machine"
    assert machine["dry_run"] is True
    assert [(r["stage"], r["ended"]) for r in ended] == [("first", "failed"), ("second", "passed")]
    summary = (out / "summary.md").read_text()
    assert summary in capsys.readouterr().out
    assert "exit code 1: broken" in summary
    assert "nothing was measured on a GPU" in summary


def test_all_passed_or_skipped(day):
    code, out = day(_python("a", "pass"), Stage("b", (), 1, missing="not here", optional=True))
    assert code == 0
    assert [r["ended"] for r in _records(out / "stages.jsonl")[1:]] == ["passed", "skipped"]


def test_everything_is_on_the_disk_at_any_moment(day, tmp_path):
    look = "import pathlib; print(pathlib.Path(r'{0}/summary.md').read_text().count('passed'), "
    look += "pathlib.Path(r'{0}/stages.jsonl').read_text().count('passed'))"
    _, out = day(_python("a", "pass"), _python("b", look.format(tmp_path / "out")))
    assert _records(out / "stages.jsonl")[-1]["detail"] == "1 1"


def test_records_of_an_earlier_day_are_gone(day):
    _, out = day(_python("a", "pass"))
    (out / "old.jsonl").write_text('{"kind": "bench"}\n')
    day(_python("a", "pass"))
    assert not (out / "old.jsonl").exists()


def test_without_a_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_day.torch.cuda, "is_available", lambda: False)
    assert gpu_day.main(["--out", str(tmp_path / "out")]) == 1
    assert "torch finds no CUDA device; --dry-run" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_commit_of_a_copy_reaches_the_records(monkeypatch, tmp_path):
    _root(monkeypatch, tmp_path, "bench/bench_new.py")
    plan = {s.name: s for s in stages.plan(tmp_path, dry_run=False, commit="abc1234")}
    assert plan["bench_new"].env["DFQ_BENCH_COMMIT"] == "abc1234"
    monkeypatch.setattr(gpu_day, "plan", lambda out, **_: [])
    gpu_day.main(["--out", str(tmp_path / "out"), "--dry-run", "--commit", "abc1234"])
    (machine,) = _records(tmp_path / "out" / "stages.jsonl")
    assert (machine["commit"], machine["dirty"]) == ("abc1234", None)


def test_a_result_is_one_line():
    line = str(Result("tests", "failed", 1.25, "exit code 1: 2 failed"))
    assert line.split() == ["tests", "failed", "1.2", "s", "exit", "code", "1:", "2", "failed"]

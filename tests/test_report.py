"""metrics.jsonl, the stop on NaN, the warning on weight collapse, and what is shown."""

import io
import json
import logging

import pytest
import torch
from rich.console import Console

from dfq.report import DivergedError, Recorder
from dfq.report.display import PlainLines, progress
from dfq.report.recorder import EVERY
from dfq.types import silent


class _NoSync:
    """A value that may be passed on but not looked at."""

    def __float__(self):
        raise AssertionError("a step that is not recorded waited for the device")


def test_every_tenth_step_and_the_last_are_written(tmp_path):
    with Recorder(silent, tmp_path / "m.jsonl") as recorder:
        for step in range(1, 24):
            recorder("fit", step, 23, loss=torch.tensor(0.5 * step), accuracy=1.0)
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 23]
    assert lines[0].keys() == {"stage", "step", "steps", "seconds", "loss", "accuracy"}
    assert (lines[1]["stage"], lines[1]["steps"], lines[1]["loss"]) == ("fit", 23, 10.0)
    assert lines[0]["seconds"] <= lines[2]["seconds"]


def test_values_are_converted_on_recorded_steps_only():
    recorder = Recorder()
    recorder("fit", EVERY - 1, 100, loss=_NoSync())
    with pytest.raises(AssertionError, match="waited"):
        recorder("fit", EVERY, 100, loss=_NoSync())


def test_lines_are_there_while_the_run_goes_on(tmp_path):
    with Recorder(silent, tmp_path / "m.jsonl") as recorder:
        recorder("fit", 10, 20, loss=1.0)
        assert (tmp_path / "m.jsonl").read_text().count("\n") == 1


def test_everything_is_passed_on():
    heard = []
    recorder = Recorder(lambda *where, **values: heard.append((where, values)))
    recorder("fit", 3, 20, loss=1.0)
    recorder("fit", 20, 20, loss=2.0)
    assert heard == [(("fit", 3, 20), {"loss": 1.0}), (("fit", 20, 20), {"loss": 2.0})]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, value):
    with Recorder(silent, tmp_path / "m.jsonl") as recorder:
        recorder("fit", 10, 40, loss=1.0)
        with pytest.raises(DivergedError, match=f"loss became {value} at step 20 of 40 of fit"):
            recorder("fit", 20, 40, loss=torch.tensor(float(value)))
    assert (tmp_path / "m.jsonl").read_text().count("\n") == 1  # JSON has no NaN


def test_weight_collapse_is_said_once_in_one_line(caplog):
    with caplog.at_level(logging.WARNING, "dfq"), Recorder() as recorder:
        recorder("fit", 10, 40, weight_entropy=0.06)
        assert not caplog.records
        for step in (20, 30, 40):
            recorder("fit", step, 40, weight_entropy=torch.tensor(0.04))
    (record,) = caplog.records
    assert "teacher weights collapse" in record.message
    assert "\n" not in record.message
    assert recorder.warnings == [record.message]


def test_warnings_of_every_stage_are_kept_while_it_is_open():
    logger = logging.getLogger("dfq")
    with Recorder() as recorder:
        logger.warning("the %s cannot be traced", "model")
        logger.info("all is well")
    logger.warning("too late")
    assert recorder.warnings == ["the model cannot be traced"]
    assert not logger.handlers


def test_time_is_counted_for_the_stage_that_ends(monkeypatch):
    times = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr("dfq.report.recorder.time.perf_counter", lambda: next(times))
    recorder = Recorder()
    recorder("warm up", 1, 2)
    recorder("warm up", 2, 2)
    recorder("fit", 1, 1)
    assert recorder.seconds == {"warm up": 3.0, "fit": 7.0}


def test_without_a_terminal_lines_come_every_ten_seconds_and_at_the_end(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("dfq.report.display.time.monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=80)
    with progress(console) as report:
        assert isinstance(report, PlainLines)
        for step in range(1, 101):
            now[0] += 0.25
            report("fit", step, 100, loss=0.12345, teacher_accuracy=0.97)
    assert console.file.getvalue().splitlines() == [
        "fit 40/100  0:15 left  loss 0.123  teacher_accuracy 97%",
        "fit 80/100  0:05 left  loss 0.123  teacher_accuracy 97%",
        "fit 100/100  done in 0:25  loss 0.123  teacher_accuracy 97%",
    ]


def test_a_terminal_shows_a_bar_and_the_latest_values():
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    with progress(console) as report:
        report("warm up", 5, 5, loss=2.0)
        report("fit", 4, 8, loss=_Half())
        report("fit", 8, 8, loss=0.25)
    shown = console.file.getvalue()
    assert "warm up" in shown
    assert "8/8" in shown
    assert "loss 0.25" in shown


class _Half:
    """Looked at no more than twice a second: the second call within it must not convert."""

    def __float__(self):
        raise AssertionError("looked twice within half a second")

"""Progress and results in the terminal: live bars on a TTY, a short line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dfq.report.recorder import logger
from dfq.types import Report

if TYPE_CHECKING:
    from torch import Tensor

LIVE_SECONDS = 0.5  # between two looks at the values, which wait for the device
PLAIN_SECONDS = 10.0


@contextmanager
def progress(console: Console) -> Iterator[Report]:
    """Give a report that shows itself, and dfq's warnings, on ``console`` until the block ends."""
    warnings = _Warnings(console)
    logger.addHandler(warnings)
    try:
        if not console.is_terminal:
            yield PlainLines(console)
            return
        bars = LiveBars(console)
        with bars.live:
            yield bars
    finally:
        logger.removeHandler(warnings)


class LiveBars:
    """One bar a stage with its time left, and the latest values below."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self._values = Text()
        self._tasks: dict[str, TaskID] = {}
        self._looked = 0.0
        self.live = Live(Group(self._progress, self._values), console=console)

    def __call__(self, stage: str, step: int, steps: int, **values: Tensor | float) -> None:
        """Move the bar of ``stage`` and look at the values twice a second."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=steps)
        self._progress.update(self._tasks[stage], completed=step, total=steps)
        now = time.monotonic()
        if now - self._looked >= LIVE_SECONDS or step == steps:
            self._looked = now
            self._values.plain = _values(values)


class PlainLines:
    """A line at the end of each stage and every ten seconds in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._starts: dict[str, float] = {}
        self._heard = self._printed = time.monotonic()

    def __call__(self, stage: str, step: int, steps: int, **values: Tensor | float) -> None:
        """Print when it is time to."""
        now = time.monotonic()
        # the first step of a stage began when the one before it was told
        started = self._starts.setdefault(stage, self._heard)
        self._heard = now
        if step != steps and now - self._printed < PLAIN_SECONDS:
            return
        self._printed = now
        spent = now - started
        when = f"{_clock(spent * (steps - step) / max(step, 1))} left"
        if step == steps:
            when = f"done in {_clock(spent)}"
        line = f"{stage} {step}/{steps}  {when}  {_values(values)}"
        self._console.print(line.rstrip(), soft_wrap=True, highlight=False, markup=False)


class _Warnings(logging.Handler):
    """One line a warning, above the bars."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        line = f"warning: {record.getMessage()}"
        self._console.print(line, style="yellow", soft_wrap=True, highlight=False, markup=False)


def accuracy_table(results: Mapping[str, Any]) -> Table:
    """Float, nearest, student and packed in one table, from a run's results."""
    measured = results["evaluation"]
    table = Table(title=f"{results['bits']}, top-1 on {measured['images']} held-out images")
    table.add_column("model")
    for column in ("top-1 %", "95 % interval", "same answer as float %"):
        table.add_column(column, justify="right")
    for key, name in _names(results["method"]).items():
        row = measured[key]
        interval = f"{row['low']:.1f} .. {row['high']:.1f}"
        style = "bold" if key == "student" else None
        table.add_row(name, f"{row['top1']:.1f}", interval, f"{row['agreement']:.1f}", style=style)
    return table


def map_table(results: Mapping[str, Any]) -> Table:
    """How far the maps of nearest, student and packed are from the float model's."""
    table = Table(title=f"{results['bits']}, distance from float on synthetic images, relative")
    table.add_column("model")
    errors = results["map_errors"]
    for index in range(len(errors["student"])):
        table.add_column(f"map {index}", justify="right")
    for key, name in _names(results["method"]).items():
        if key in errors:
            row = [f"{100 * error:.1f} %" for error in errors[key]]
            table.add_row(name, *row, style="bold" if key == "student" else None)
    return table


def _names(method: str) -> dict[str, str]:
    """What a table calls the models that were measured."""
    return {
        "float": "float",
        "nearest": "nearest, no learning",
        "student": method,
        "packed": f"{method}, as integers",
    }


def _values(values: Mapping[str, Tensor | float]) -> str:
    return "  ".join(f"{name} {_number(name, float(v))}" for name, v in values.items())


def _number(name: str, value: float) -> str:
    return f"{100 * value:.0f}%" if name.endswith("accuracy") else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"

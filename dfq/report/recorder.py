"""What a run tells while it works: metrics.jsonl, a stop on NaN, a warning on weight collapse."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from dfq.types import Report, silent

if TYPE_CHECKING:
    from torch import Tensor

EVERY = 10  # steps between two lines; only then are values converted, which waits for the device
COLLAPSED = 0.05  # of log(teachers): below it one teacher holds nearly all of the weight

logger = logging.getLogger("dfq")


class DivergedError(RuntimeError):
    """A loss became NaN or infinite; one sentence says which, when and what to do."""


class Recorder:
    """A :class:`dfq.types.Report` that passes on to another and keeps what it hears.

    Every :data:`EVERY` steps of a stage, and at its last, one line goes to ``path``:
    ``{"stage", "step", "steps", "seconds", <name>: <value>, ...}``.

    Attributes:
        seconds: time spent in each stage so far.
        warnings: what any stage has logged as a warning so far.
    """

    def __init__(self, report: Report = silent, path: Path | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.warnings: list[str] = []
        self._collapsed = False
        self._keeper = _Keeper(self.warnings)
        self._report = report
        self._file: TextIO | None = path.open("w", encoding="utf-8") if path else None
        self._start = self._last = time.perf_counter()

    def __enter__(self) -> Recorder:
        logger.addHandler(self._keeper)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        logger.removeHandler(self._keeper)
        if self._file:
            self._file.close()

    def __call__(self, stage: str, step: int, steps: int, **values: Tensor | float) -> None:
        """Pass on; record every :data:`EVERY` steps.

        Raises:
            DivergedError: a recorded value is NaN or infinite.
        """
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
        if step % EVERY == 0 or step == steps:
            self._record(stage, step, steps, {name: float(v) for name, v in values.items()})
        self._report(stage, step, steps, **values)

    def _record(self, stage: str, step: int, steps: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"{name} became {value} at step {step} of {steps} of {stage}; "
                    "lower the learning rates or try another seed."
                )
        if values.get("weight_entropy", 1.0) < COLLAPSED and not self._collapsed:
            self._collapsed = True
            logger.warning(
                f"the teacher weights collapse: their entropy is {values['weight_entropy']:.3f} "
                f"of its maximum at step {step} of {stage}, so one teacher decides alone."
            )
        if self._file:
            seconds = round(self._last - self._start, 3)
            line = {"stage": stage, "step": step, "steps": steps, "seconds": seconds, **values}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


class _Keeper(logging.Handler):
    """Appends every warning to a list."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.sentences = sentences

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the sentence."""
        self.sentences.append(record.getMessage())

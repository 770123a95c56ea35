"""What ``dfq bench`` found, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

NOTHING = "-"
Row = dict[str, Any]


def table(rows: Sequence[Row], facts: Row) -> Table:
    """A line for each way to run each network; what could not run tells why."""
    caption = [
        f"{facts['device']}, torch {facts['torch']}, {facts['threads']} CPU threads.",
        f"ms: of a batch, median of {facts['turns']} turns and half the way from 20 to 80 %.",
        "memory: weights, activations and images at most, each in a process of its own.",
        *sorted({f"no {row['name']}: {row['reason']}" for row in rows if row["reason"]}),
    ]
    made = _empty("\n".join(caption), "network")
    for name in ("ms", "", "images/s", "x fp32", "file MB", "memory MB"):
        made.add_column(name, justify="right", no_wrap=True)
    before: tuple[Any, Any] | None = None
    for row in rows:
        group = (row["target"], row["batch"])
        if group != before:
            if before:
                made.add_section()
            made.add_row(f"[bold]{row['target']}", f"batch {row['batch']}")
        made.add_row(f"  {row['name']}", *_cells(row))
        before = group
    return made


def layer_table(rows: Sequence[Row]) -> Table:
    """A line for each step."""
    made = _empty(
        "fp32: the convolution or linear layer alone, without BatchNorm, ReLU and sums.", "layer"
    )
    for name in ("output", "ms", "fp32 ms", "x fp32"):
        made.add_column(name, justify="right")
    before = None
    for row in rows:
        if row["target"] != before:
            made.add_row(f"[bold]{row['target']}")
        shape, theirs = "x".join(map(str, row["shape"])), row["fp32_ms"]
        times = theirs / max(row["ms"], 1e-9) if theirs else None
        figures = (_number(row["ms"]), _number(theirs), _number(times))
        made.add_row(f"  {row['layer']}", shape, *figures)
        before = row["target"]
    return made


def _empty(caption: str, *columns: str) -> Table:
    return Table(*columns, caption=caption, caption_justify="left", box=box.SIMPLE, padding=(0, 1))


def _cells(row: Row) -> list[str]:
    sizes = [_number(row[name] / 1e6 if row[name] else None) for name in ("file", "peak")]
    if "ms" not in row:
        return [NOTHING, "", NOTHING, NOTHING, *sizes]
    spread = f"±{50 * (row['ms_p80'] - row['ms_p20']) / row['ms']:.0f} %"
    rate, times = _number(row["images_per_second"]), _number(row["times_fp32"])
    return [_number(row["ms"]), spread, rate, times, *sizes]


def _number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return NOTHING
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

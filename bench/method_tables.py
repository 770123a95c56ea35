"""The table of accuracies: mean and standard deviation over seeds, always of the last step.

Figures are top-1 unless the model's cell names another measure; drops are in points of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from bench.published import PUBLISHED

Record = dict[str, Any]
HEAD = (
    *("model", "protocol", "bits", "method", "effort", "float", "nearest"),
    *("drop", "packed", "seeds", "CPU min", "GB", "published drops"),
)
TEXTS = 5  # columns before the numbers
TOP1 = "top-1"  # the measure that goes without saying


def accuracy_table(records: Iterable[Record]) -> list[str]:
    """Markdown, one row for the seeds of one setting, in the order of the records."""
    settings: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        settings.setdefault(_setting(record), []).append(record)
    rule = ["---" if i < TEXTS else "---:" for i in range(len(HEAD) - 1)] + ["---"]
    rows = [_row(setting, runs) for setting, runs in sorted(settings.items(), key=_order)]
    return [f"| {' | '.join(cells)} |" for cells in (HEAD, rule, *rows)]


def circumstances(records: Iterable[Record]) -> list[str]:
    """One sentence for each machine and version among the records, with its commits and days."""
    places: dict[str, list[Record]] = {}
    for record in records:
        places.setdefault(_place(record), []).append(record)
    return [f"{place}; {_commits(runs)}; {_days(runs)}." for place, runs in places.items()]


def _place(record: Record) -> str:
    count = record["eval_images"]
    measured = f"{count} real images" if count is not None else record["measure"]
    parts = [f"{measured}, for measuring only", f"{record['processor']} ({record['isa']})"]
    return "; ".join([*parts, f"threads: {record['threads']}", f"torch {record['torch']}"])


def _commits(runs: Sequence[Record]) -> str:
    names = (run["commit"] + " with changes" * bool(run["dirty"]) for run in runs)
    commits = list(dict.fromkeys(names))
    return f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def _days(runs: Sequence[Record]) -> str:
    days = sorted({run["date"] for run in runs})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _setting(record: Record) -> tuple[Any, ...]:
    protocol = record["protocol"]
    if record["edge_bits"]:
        protocol = f"{protocol}, edges {record['edge_bits']} bits"
    effort = record["effort"]
    if record.get("images_file"):
        effort = f"{effort}, images of {record['images_file']}"
    model = record["model"]
    if record["measure"] != TOP1:
        model = f"{model} ({record['measure']})"
    names = ("bits", "method", "images_sha256")
    bits, method, digest = (record.get(name) for name in names)
    return model, protocol, bits, effort, method, digest


def _order(item: tuple[tuple[Any, ...], Sequence[Record]]) -> tuple[Any, ...]:
    """By model, protocol and bits, from many to few; within, the smallest drop first."""
    (model, protocol, bits, *_), runs = item
    return model, protocol, [-int(n) for n in bits[1:].split("a")], statistics.mean(_drops(runs))


def _row(setting: tuple[Any, ...], runs: Sequence[Record]) -> list[str]:
    model, protocol, bits, effort, method, _ = setting
    published = PUBLISHED.get((model, protocol, bits), ())
    return [
        *(model, protocol, bits, f"`{method}`", effort),
        f"{runs[0]['float']:.1f}",
        f"{_mean(runs, 'nearest'):.1f}",
        _spread(_drops(runs)),
        f"{_mean(runs, 'packed'):.1f}",
        str(len(runs)),
        f"{_mean(runs, 'cpu_seconds') / 60:.1f}",
        f"{max(run['peak_mb'] for run in runs) / 1024:.1f}",
        ", ".join(f"{drop} {name}" for drop, name in published),
    ]


def _drops(runs: Sequence[Record]) -> list[float]:
    return [run["float"] - run["student"] for run in runs]


def _mean(runs: Sequence[Record], name: str) -> float:
    return statistics.mean(run[name] for run in runs)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean

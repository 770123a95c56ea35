"""Tables of records, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
COLUMNS = ("ATen", "eager composite", "torch.compile")  # baselines with a column of their own


@dataclass(frozen=True)
class Measured:
    """One implementation in one case: what its records share, and the ratio to each baseline."""

    record: Record
    ratios: dict[str, float]

    @property
    def case(self) -> tuple[str, str, str]:
        """op, case and size: what two backends have in common."""
        return self.record["op"], self.record["case"], self.record["size"]


def measured(records: Iterable[Record]) -> list[Measured]:
    """The records of benches, those of one case and backend together, in order."""
    found: dict[tuple[str, ...], Measured] = {}
    for record in records:
        if record["kind"] == "bench":
            key = tuple(record[name] for name in ("op", "case", "size", "device", "backend"))
            item = found.setdefault(key, Measured(record, {}))
            if record["baseline"] is not None:
                item.ratios[record["baseline"]] = record["ratio"]
    return list(found.values())


def cpu_table(items: Sequence[Measured]) -> list[str]:
    """Times per element, and how many times as long each baseline takes."""
    head = ["op", "case", "input", "ns / element", *COLUMNS, "other"]
    rows = [
        [*_what(item), _digits(item.record["ns_per_element"]), *_ratios(item)] for item in items
    ]
    return _markdown(head, rows, numbers_from=3)


def gpu_table(items: Sequence[Measured]) -> list[str]:
    """Times, the share of the copy bandwidth that is reached, and the same ratios."""
    head = ["op", "case", "input", "backend", "µs (p20-p80)", "GB/s", "of copy"]
    head += [*COLUMNS, "other"]
    rows = []
    for item in items:
        record = item.record
        times = [_digits(record[name]) for name in ("us", "us_p20", "us_p80")]
        of_copy = record["of_copy_bandwidth"]
        rows.append(
            [
                *_what(item),
                record["backend"],
                f"{times[0]} ({times[1]}-{times[2]})",
                "" if record["gb_per_s"] is None else f"{record['gb_per_s']:.0f}",
                "" if of_copy is None else f"{of_copy:.0%}",
                *_ratios(item),
            ]
        )
    return _markdown(head, rows, numbers_from=4)


def fastest(items: Sequence[Measured]) -> list[Measured]:
    """Of each case the backend that takes least time."""
    best: dict[tuple[str, str, str], Measured] = {}
    for item in items:
        other = best.setdefault(item.case, item)
        if item.record["us"] < other.record["us"]:
            best[item.case] = item
    return list(best.values())


def winners(items: Sequence[Measured]) -> list[str]:
    """A line for each op: which of its backends is faster, by the geometric mean of its cases.

    Only cases that take a single op count.
    """
    lines = []
    for op in dict.fromkeys(item.record["op"] for item in items):
        single = [i for i in items if i.record["op"] == op and i.record["ops"] == [op]]
        times: dict[str, dict[tuple[str, str, str], float]] = {}
        for item in single:
            times.setdefault(item.record["backend"], {})[item.case] = item.record["us"]
        if single:
            lines.append(f"{op}: {_winner(times)}")
    return lines


def missed(items: Sequence[Measured], records: Iterable[Record]) -> list[str]:
    """A line for each aim that the faster backend of a case does not reach."""
    best = {(*item.case, item.record["backend"]) for item in fastest(items)}
    lines: dict[str, None] = {}
    for record in records:
        if record["kind"] != "bench":
            continue
        what = tuple(record[name] for name in ("op", "case", "size", "backend"))
        if what not in best:
            continue
        name = ", ".join(what)
        if record["aim"] is not None and record["ratio"] < record["aim"]:
            line = (
                f"{name}: {_digits(record['ratio'])}x {record['baseline']}, aim {record['aim']:g}"
            )
            lines[line] = None
        share, aim = record["of_copy_bandwidth"], record["of_copy_aim"]
        if aim is not None and share < aim:
            lines[f"{name}: {share:.0%} of the copy bandwidth, aim {aim:.0%}"] = None
    return list(lines)


def circumstances(records: Iterable[Record]) -> list[str]:
    """One sentence for each machine, version and commit among the records."""
    return list(dict.fromkeys(_circumstance(r) for r in records if r["kind"] == "bench"))


def _circumstance(record: Record) -> str:
    place = record["gpu"] if record["device"] == "cuda" else record["processor"]
    if record["device"] == "cpu":
        place += f" ({record['isa']}), one thread unless said"
    parts = [place, f"torch {record['torch']}"]
    if record["device"] == "cuda":
        parts.append(f"triton {record['triton']}")
    changed = " with changes" if record["dirty"] else ""
    parts += [f"commit {record['commit']}{changed}", record["date"]]
    if record["load"] > 0.75 * record["cores"]:
        parts.append(f"taken while the machine did other work (load {record['load']:g})")
    return "; ".join(parts) + "."


def _winner(times: dict[str, dict[tuple[str, str, str], float]]) -> str:
    if len(times) == 1:
        return f"{next(iter(times))}, the only backend that ran"
    (a, of_a), (b, of_b) = times.items()
    shared = [case for case in of_a if case in of_b]
    if not shared:
        return f"{a} and {b} have no case in common"
    ratios = [of_b[case] / of_a[case] for case in shared]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    if mean < 1:
        a, b, mean, ratios = b, a, 1 / mean, [1 / ratio for ratio in ratios]
    of = f"{len(ratios)} cases, {_digits(min(ratios))}-{_digits(max(ratios))}"
    return f"{a}, {mean:.2f} times as fast as {b} ({of})"


def _what(item: Measured) -> list[str]:
    op, case, size = item.case
    return [f"`{op}`", case, size]


def _ratios(item: Measured) -> list[str]:
    """A cell for each of COLUMNS and one for the rest; what a name says beyond its column stays."""
    cells = dict.fromkeys(COLUMNS, "")
    other = []
    for name, ratio in item.ratios.items():
        column = next((c for c in COLUMNS if name == c or name.startswith(f"{c} ")), None)
        if column is None or cells[column]:
            other.append(f"{_digits(ratio)}x {name}")
        else:
            detail = name.removeprefix(column).strip()
            cells[column] = f"{_digits(ratio)}x" + (f" ({detail})" if detail else "")
    return [*cells.values(), ", ".join(other)]


def _digits(value: float) -> str:
    """Three digits at most, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def _markdown(head: list[str], rows: list[list[str]], numbers_from: int) -> list[str]:
    rule = ["---" if i < numbers_from else "---:" for i in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]

"""``python -m bench.report``: the tables in README.md, from bench/results and nothing else.

Each folder bench/results/<name> fills what stands between ``<!-- bench:<name> -->`` and
``<!-- /bench:<name> -->``. ``--check`` changes nothing and exits with 1 if a table is out of date.
The records of a folder are made by

    DFQ_BENCH_RECORD=bench/results/cpu/<op>.jsonl pytest bench/bench_<op>.py
    python -m bench.gpu_day --out bench/results/h200
    python -m bench.bench_methods MODEL … --record bench/results/methods/<model>.jsonl
    python -m bench.bench_methods MODEL … --images FILE --record bench/results/dmkd/<model>.jsonl
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import method_tables, record, tables
from bench.settings import ROOT

NOTHING = "Not measured yet."
BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- /bench:\2 -->)", re.DOTALL)


def fill(readme: str, results: Path) -> str:
    """``readme`` with the tables of today.

    Raises:
        ValueError: if a folder of results has no place in it, or holds what tiny shapes gave.
    """
    named = {match[2] for match in BLOCK.finditer(readme)}
    folders = {path.name for path in results.iterdir() if path.is_dir()} if results.exists() else ()
    for name in sorted(set(folders) - named):
        raise ValueError(
            f"{results / name} has no place in the README; "
            f"add the lines <!-- bench:{name} --> and <!-- /bench:{name} -->."
        )

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}{section(results / match[2])}{match[3]}"

    return BLOCK.sub(block, readme)


def section(folder: Path) -> str:
    """What one folder of results has to say."""
    records = [r for r in record.read(folder) if r["kind"] == "bench"]
    if any(r["tiny"] for r in records):
        raise ValueError(f"{folder} holds figures of tiny shapes, which mean nothing; remove them.")
    accuracies = [r for r in record.read(folder) if r["kind"] == "method"]
    if accuracies:
        table = method_tables.accuracy_table(accuracies)
        return "\n".join(["", *table, "", *method_tables.circumstances(accuracies), "", ""])
    items = tables.measured(records)
    if not items:
        return f"{NOTHING}\n"
    on_gpu = items[0].record["device"] == "cuda"
    table = tables.gpu_table(tables.fastest(items)) if on_gpu else tables.cpu_table(items)
    return "\n".join(["", *table, "", *tables.circumstances(records), "", ""])


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the README, or check it."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a table is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    flags = parser.parse_args(argv)
    before = flags.readme.read_text()
    try:
        after = fill(before, flags.results)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    if after == before:
        return 0
    if flags.check:
        print(f"{flags.readme} is out of date; run python -m bench.report.", file=sys.stderr)
        return 1
    flags.readme.write_text(after)
    print(f"wrote {flags.readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

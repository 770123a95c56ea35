"""What the GPU day found, for a reader: bench/gpu_day.py writes it after every stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import tables
from bench.roof import Roof
from bench.stages import Result

DRY_RUN = "A dry run: every stage ran on the CPU, and nothing was measured on a GPU."


def summary(
    machine: dict[str, Any], results: Sequence[Result], records: list[dict[str, Any]]
) -> str:
    """Stages, roof, winners, missed aims and every case, as Markdown."""
    items = tables.measured(records)
    blocks: dict[str, Sequence[object]] = {
        "What the device can do": [Roof.of(r) for r in records if r["kind"] == "roof"],
        "The faster backend": tables.winners(items),
        "Aims missed by it": tables.missed(items, records),
        "Cases": tables.gpu_table(items),
    }
    lines = ["# GPU day", "", _machine(machine), "", *_missing(machine["missing"])]
    lines += _block("Stages", results)
    if machine["dry_run"]:
        counts = ", ".join(f"{len(block)} lines of {title}" for title, block in blocks.items())
        return "\n".join([*lines, DRY_RUN, f"It made, and leaves out: {counts}.", ""])
    for title, block in blocks.items():
        lines += _block(title, block)
    return "\n".join([*lines, "Under a baseline: how many times as long it takes.", ""])


def _machine(machine: dict[str, Any]) -> str:
    parts = [
        machine["gpu"] or "no GPU",
        f"driver {machine['driver']}",
        f"CUDA {machine['cuda']}",
        f"torch {machine['torch']}",
        f"triton {machine['triton']}",
        f"Python {machine['python']}",
        f"{machine['processor']}, {machine['cores']} cores",
        f"commit {machine['commit']}" + (" with changes" if machine["dirty"] else ""),
        machine["date"],
    ]
    return "; ".join(parts) + "."


def _missing(missing: dict[str, str]) -> list[str]:
    return [*(f"- no {tool}: {loss}" for tool, loss in missing.items()), ""] if missing else []


def _block(title: str, lines: Sequence[object]) -> list[str]:
    if not lines:
        return []
    text = [str(line) for line in lines]
    fence = [] if text[0].startswith("|") else ["```"]  # a table needs none
    return [f"## {title}", "", *fence, *text, *fence, ""]

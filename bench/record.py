"""JSON lines: what was measured, and the circumstances without which a figure means nothing."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.settings import COMMIT, RECORD, ROOT, TINY


def start() -> None:
    """Begin the file anew and take down the circumstances, before the measuring changes them."""
    circumstances()
    if RECORD:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text("")


def write(values: Mapping[str, Any]) -> None:
    """Append one line; it is on the disk when this returns."""
    if RECORD:
        append(RECORD, dict(values) | circumstances())


def append(path: Path, values: Mapping[str, Any]) -> None:
    """Append one line to any such file."""
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """Every line of every ``.jsonl`` in ``folder`` and below, file by file in order of name.

    A last line without its end, of a process that was killed, is left out.
    """
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


@functools.cache
def circumstances() -> dict[str, Any]:
    """What a reader needs to believe or repeat a number."""
    commit, dirty = _commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 1),  # before the measuring began
        "tiny": TINY,
    }


def _commit() -> tuple[str, bool | None]:
    """The commit, and whether files that it holds were changed since, results apart."""
    if COMMIT or not (ROOT / ".git").exists():
        return COMMIT or "unknown", None
    changed = ["status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!README.md"]
    return _git("rev-parse", "--short", "HEAD"), bool(_git(*changed))


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

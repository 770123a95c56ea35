"""Tiles that were measured to be fastest, from tuned/sm<architecture>.json beside this file.

The file maps a layer's key (integer_plan) to the fields of a ``Tile``. Where it is missing or has
no such key, a rule chooses the tile. Only measurements belong there: bench/results says which.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("tuned")


def tuned(key: str, sm: int) -> dict[str, Any] | None:
    """The fields of the tile for ``key``, or None."""
    return _table(FOLDER / f"sm{sm}.json").get(key)


@functools.cache
def _table(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    table = json.loads(path.read_text())
    return {key: {**tile, "box": tuple(tile.get("box", (1, 1, 1)))} for key, tile in table.items()}

"""Quantize a trained CNN to 2-8 bits without its data.

    float model -> prepare -> synthesize -> distill -> deploy

The packages are the stages, in the order the data flows. They do not know each other: a method
(``dfq.methods``) is where they meet, and ``dfq.quantize`` walks the whole way.
"""

from __future__ import annotations

import importlib
from typing import Any

from dfq.types import DataSpec, InputError, QuantSpec

__version__ = "0.1.0"
__all__ = ["DataSpec", "InputError", "QuantSpec", "__version__", "load", "quantize"]

_LAZY = {"load": "dfq.deploy", "quantize": "dfq.pipeline"}  # these need torch; dfq does not


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'dfq' has no attribute {name!r}")

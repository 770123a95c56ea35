"""Where a run comes from: the model, its weights, the code and the machine."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import dfq


@dataclass(frozen=True)
class Source:
    """Where a model came from.

    Attributes:
        model: its MODEL string; None for a model object.
        weights: its weight file, if any.
    """

    model: str | None = None
    weights: Path | None = None


def file_sha256(path: Path) -> str:
    """As ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def state_sha256(model: nn.Module) -> str:
    """Hash of the names, types, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def versions(device: torch.device) -> dict[str, str | int]:
    """What else decides the bits of a result."""
    found: dict[str, str | int] = {
        "dfq": dfq.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def commit() -> str | None:
    """Commit of the checkout that runs, with ``-dirty`` after it; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True
        )
    except OSError:  # no git
        return None
    if head.returncode or changes.returncode:
        return None
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")

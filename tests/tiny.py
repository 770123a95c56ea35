"""A network and images of a second, for the tests around the stages."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from dfq.types import DataSpec

MODEL = f"{Path(__file__)}:network"
DATA = DataSpec((1, 8, 8), 4, (0.5,), (0.25,))
FLAGS = ["--shape", "1,8,8", "--classes", "4", "--mean", ".5", "--std", ".25"]


def network() -> nn.Module:
    """[B, 1, 8, 8] -> [B, 4]; always the same weights, never those of the global seed."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=rng)
    return model


def without_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 8), nn.GroupNorm(2, 4), nn.Flatten())


def save_images(path: Path, count: int = 40, **changes: object) -> Path:
    """An evaluation file for :func:`network`; ``changes`` replace its arrays."""
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8),
        "y": rng.integers(0, 4, count),
    }
    np.savez(path, **{**arrays, **changes})
    return path

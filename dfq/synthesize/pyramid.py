"""Free images that begin smooth: a sum of maps of falling resolution, all of them learned."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dfq.synthesize.latents import image_moments
from dfq.synthesize.teachers import normalization
from dfq.types import DataSpec


class Pyramid(nn.Module):
    """``count`` images [count, C, H, W] = ``mean + std * sum_k gain**k * up(map_k) / norm``.

    Map ``k`` has a ``2**k``-th of the resolution and starts as Gaussian noise; ``norm`` makes the
    variance of the sum about 1. One level is plain pixels. With several, a step moves coarse and
    fine structure alike, where steps of single pixels leave noise (the preconditioning of feature
    visualization, Olah et al., Distill 2017, in steps of two). Values that no image can hold are
    clamped.

    Args:
        count: images.
        data: their shape and normalization.
        levels: number of maps; fewer where a map would have less than two pixels a side.
        gain: of each coarser map over the next finer one.
        rng: CPU generator.
    """

    def __init__(
        self, count: int, data: DataSpec, levels: int, gain: float, *, rng: torch.Generator
    ):
        super().__init__()
        channels, height, width = data.shape
        levels = max(1, min(levels, int(math.log2(min(height, width)))))
        sizes = [(math.ceil(height / 2**k), math.ceil(width / 2**k)) for k in range(levels)]
        self.maps = nn.ParameterList(
            torch.randn(count, channels, *size, generator=rng) for size in sizes
        )
        norm = math.sqrt(sum(gain ** (2 * k) for k in range(levels)))
        self.weights = [gain**k / norm for k in range(levels)]
        self.mean, self.std = image_moments(data)
        for k, size in enumerate(sizes):
            self.register_buffer(f"rows{k}", interpolation(size[0], height))
            self.register_buffer(f"columns{k}", interpolation(size[1], width))
        mean, std = torch.tensor(normalization(data))[:, :, None, None]
        self.register_buffer("low", -mean / std)
        self.register_buffer("high", (1 - mean) / std)

    def forward(self) -> Tensor:
        """The images."""
        images = self.weights[0] * self.maps[0]
        for k in range(1, len(self.maps)):
            rows, columns = self.get_buffer(f"rows{k}"), self.get_buffer(f"columns{k}")
            images = images + self.weights[k] * (rows @ self.maps[k] @ columns.T)
        images = self.mean + self.std * images
        return images.clamp(self.get_buffer("low"), self.get_buffer("high"))


def interpolation(size: int, new_size: int) -> Tensor:
    """[new_size, size], rows of which sum to one: linear interpolation as a matrix.

    As ``F.interpolate(..., mode="linear")``, the gradient of which is not deterministic on GPUs.
    """
    place = ((torch.arange(new_size) + 0.5) * size / new_size - 0.5).clamp(0, size - 1)
    return (1 - (place[:, None] - torch.arange(size)).abs()).clamp(min=0)

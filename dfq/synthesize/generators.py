"""Generators: GDFQ's, conditional (arXiv:2003.03603), and one without labels for large images."""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from dfq.types import DataSpec

Conditioning = Literal["embedding", "batchnorm"]
SMALLEST_SIDE = 8  # of the map that a latent becomes in stages, or a little more


class ClassBatchNorm2d(nn.Module):
    """BatchNorm whose gain and bias belong to the class: [B, C, H, W] and [B] -> [B, C, H, W]."""

    def __init__(self, channels: int, classes: int, eps: float):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=eps, affine=False)
        self.gain = nn.Embedding(classes, channels)
        self.bias = nn.Embedding(classes, channels)
        nn.init.ones_(self.gain.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Normalize ``x``, then scale and shift by each sample's class."""
        gain = self.gain(labels)[:, :, None, None]  # [B, C, 1, 1]
        return self.norm(x) * gain + self.bias(labels)[:, :, None, None]


class ConditionalGenerator(nn.Module):
    """[B, latent_dim] and [B] -> normalized images [B, C, H, W].

    A linear layer makes a quarter-size map; two nearest-neighbor upsamplings with a convolution
    each bring it to full size; tanh and a BatchNorm without affine part end in the space of
    normalized images (mean 1/2 and deviation 1/4 of images in 0..1, if ``data`` normalizes not).
    Small images learn their class from an embedding that multiplies the latent (GDFQ's CIFAR
    form), images over 64 pixels from class-conditional BatchNorm (its ImageNet form).

    Args:
        data: shape and number of classes.
        latent_dim: length of a latent; the released code uses 100.
        width: channels after the linear layer; the released code uses 128.
        bn_eps: epsilon of the BatchNorms (0.8 in the released code, by a slip of arguments).
        conditioning: "embedding", "batchnorm", or None to choose by image size.
    """

    def __init__(
        self,
        data: DataSpec,
        latent_dim: int = 100,
        width: int = 128,
        bn_eps: float = 1e-5,
        conditioning: Conditioning | None = None,
    ):
        super().__init__()
        channels, height, final_width = data.shape
        self.normalized = bool(data.mean or data.std)
        start = (math.ceil(height / 4), math.ceil(final_width / 4))
        half = (math.ceil(height / 2), math.ceil(final_width / 2))
        if conditioning is None:
            conditioning = "embedding" if max(height, final_width) <= 64 else "batchnorm"
        embed = conditioning == "embedding"
        self.embedding = nn.Embedding(data.classes, latent_dim) if embed else None
        self.project = nn.Linear(latent_dim, width * start[0] * start[1])
        self.unflatten = nn.Unflatten(1, (width, *start))
        self.upsample = nn.ModuleList(nn.Upsample(size) for size in (half, (height, final_width)))
        widths = (width, width, width // 2)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(c, eps=bn_eps) if embed else ClassBatchNorm2d(c, data.classes, bn_eps)
            for c in widths
        )
        self.to_image = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.image_norm = nn.BatchNorm2d(channels, affine=False)
        # convolutions here run 2x faster in it; torch's stubs do not know the keyword
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Images for ``latents`` of classes ``labels``."""
        if self.embedding is not None:
            latents = latents * self.embedding(labels)
        x = self._normalize(0, self.unflatten(self.project(latents)), labels)
        for layer, (upsample, conv) in enumerate(zip(self.upsample, self.convs, strict=True), 1):
            x = nn.functional.leaky_relu(self._normalize(layer, conv(upsample(x)), labels), 0.2)
        images = self.image_norm(torch.tanh(self.to_image(x)))
        return images if self.normalized else 0.5 + 0.25 * images

    def _normalize(self, index: int, x: Tensor, labels: Tensor) -> Tensor:
        norm = self.norms[index]
        return norm(x) if self.embedding is not None else norm(x, labels)


class StagedGenerator(nn.Module):
    """[B, latent_dim] -> normalized images [B, C, H, W], channels halving as the map doubles.

    ``LatentGenerator`` begins at a quarter of the size: for 352 pixels its linear layer alone has
    250 million weights and its convolutions take ten times as long as a small detector. Here the
    linear layer makes a map of 8 to 16 pixels; tanh and a BatchNorm without affine part end, as
    there, in the space of normalized images. No labels, no classes.

    Args:
        data: shape of an image.
        latent_dim: length of a latent.
        width: channels of the first map.
        narrowest: channels of the last map but the image.
    """

    def __init__(
        self, data: DataSpec, latent_dim: int = 256, width: int = 256, narrowest: int = 16
    ):
        super().__init__()
        channels, height, last = data.shape
        stages = max(1, int(math.log2(max(height, last) / SMALLEST_SIDE)))
        sizes = [(math.ceil(height / 2**k), math.ceil(last / 2**k)) for k in range(stages, -1, -1)]
        self.mean, self.std = image_moments(data)
        self.start = (*sizes[0], width)
        self.project = nn.Linear(latent_dim, width * sizes[0][0] * sizes[0][1])
        body: list[nn.Module] = [nn.BatchNorm2d(width)]
        for size in sizes[1:-1]:
            narrow = max(width // 2, narrowest)
            body += [nn.Upsample(size), nn.Conv2d(width, narrow, 3, padding=1)]
            body += [nn.BatchNorm2d(narrow), nn.LeakyReLU(0.2)]
            width = narrow
        body += [nn.Upsample(sizes[-1]), nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()]
        self.body = nn.Sequential(*body, nn.BatchNorm2d(channels, affine=False))
        # convolutions here run 2x faster in it; torch's stubs do not know the keyword
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, latents: Tensor) -> Tensor:
        """Images for ``latents``."""
        x = self.project(latents).unflatten(1, self.start).permute(0, 3, 1, 2)  # channels_last
        return self.mean + self.std * self.body(x)


def image_moments(data: DataSpec) -> tuple[float, float]:
    """Mean and standard deviation that the pixels of the model's images have, as far as known."""
    return (0.0, 1.0) if data.mean or data.std else (0.5, 0.25)

"""Images distilled from a teacher through a generator's prior: GENIE-D (arXiv:2212.04780).

Latents and generator are both learned, for one batch of images, until what reaches the teacher's
BatchNorm layers looks like what they remember. No labels, no classes. From the description of the
released code; the cosine schedule and the generator that is kept are ours. On ResNet-20 the
BatchNorm mismatch is lower after 50 steps a batch with a generator that is kept (0.22 from the
fourth on) than after 200 steps with a fresh one (0.46), and a step in bfloat16 takes 0.55 of the
time that it takes in float32 and comes as near to the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dfq.bounds import COUNT, NOT_NEGATIVE
from dfq.descent import anneal, descend, seeded_layers
from dfq.outputs import labels
from dfq.synthesize.bn_stats import capture_bn_statistics
from dfq.synthesize.generate import has_bfloat16
from dfq.synthesize.generators import StagedGenerator, image_moments
from dfq.synthesize.losses import Moment, bn_mismatch, image_mismatch
from dfq.synthesize.swing import swing_convolutions
from dfq.types import DataSpec, Images, Report, silent

PATIENCE, SMALLEST_RATE = 100, 1e-4  # of the latents' plateau decay in the released code
DECAY, DECAY_EVERY = 0.95, 100  # of the generator's rate there
LARGE = 64  # pixels; the quarter of a larger image takes too many weights


@dataclass(frozen=True)
class LatentConfig:
    """How images are distilled; the defaults are ours, ``GENIE_LATENTS`` the paper's.

    Attributes:
        batch_size: images of one batch; 128 in the released code.
        batches: batches in all.
        steps: steps for one batch.
        first_steps: further steps for the first batch, if the generator is kept.
        keep_generator: go on with the last batch's generator instead of a fresh one. Its rate stays
            as it is.
        lr: Adam's rate for the generator; 0.01 in the released code (called ``lr_z`` there).
        latent_lr: Adam's rate for the latents; 0.1 in the released code (called ``lr_g`` there).
        schedule: rates fall by half a cosine over each batch, or as in the released code: the
            latents' tenfold on a plateau of 100 steps, the generator's by 5 % every 100 steps.
        latent_dim: length of a latent; 256 in the released code.
        stages: make images by a ``StagedGenerator`` instead of GENIE's ``LatentGenerator``; None:
            those over 64 pixels.
        bn_moment: what is compared at a BatchNorm, see ``bn_mismatch``.
        image_weight: of the pull of every image's own mean and deviation towards the data's.
        swing: move the input of strided convolutions at random.
        bfloat16: run generator and teacher in bfloat16 where the device computes in it; statistics
            and losses stay in float32.
    """

    batch_size: int = 128
    batches: int = 8
    steps: int = 80
    first_steps: int = 80
    keep_generator: bool = True
    lr: float = 3e-3
    latent_lr: float = 0.1
    schedule: Literal["cosine", "genie"] = "cosine"
    latent_dim: int = 256
    stages: bool | None = None
    bn_moment: Moment = "std"
    image_weight: float = 1.0
    swing: bool = True
    bfloat16: bool = True

    def __post_init__(self) -> None:
        COUNT.check(batch_size=self.batch_size, steps=self.steps, latent_dim=self.latent_dim)
        NOT_NEGATIVE.check(
            batches=self.batches,
            first_steps=self.first_steps,
            lr=self.lr,
            latent_lr=self.latent_lr,
            image_weight=self.image_weight,
        )

    @property
    def total_steps(self) -> int:
        """Steps for all batches."""
        return self.batches * self.steps + self.keep_generator * self.first_steps


GENIE_LATENTS = LatentConfig(  # the released code's, except that no seed was fixed there
    steps=4000, keep_generator=False, lr=0.01, schedule="genie", stages=False, bfloat16=False
)


# Of large images, for models of maps: few in a batch, and a detector's activations, unlike those of
# a classifier that ends in logits, may be of any scale.
MAPS_LATENTS = LatentConfig(
    batch_size=16,
    batches=4,
    steps=60,
    first_steps=40,
    bn_moment="relative",
    image_weight=0.1,
)


class LatentGenerator(nn.Module):
    """[B, latent_dim] -> normalized images [B, C, H, W]: GENIE's generator, without classes.

    A linear layer makes a quarter-size map; a convolution at half and one at full size follow.
    tanh and a BatchNorm without affine part end in the space of normalized images (mean 1/2 and
    deviation 1/4 of images in 0..1, if ``data`` normalizes not).
    """

    def __init__(self, data: DataSpec, latent_dim: int = 256, width: int = 128):
        super().__init__()
        channels, height, final_width = data.shape
        start = (math.ceil(height / 4), math.ceil(final_width / 4))
        half = (math.ceil(height / 2), math.ceil(final_width / 2))
        self.mean, self.std = image_moments(data)
        self.start = (*start, width)
        self.project = nn.Linear(latent_dim, width * start[0] * start[1])
        self.body = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.Upsample(half),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2),
            nn.LeakyReLU(0.2),
            nn.Upsample((height, final_width)),
            nn.Conv2d(width // 2, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )
        # convolutions here run 2x faster in it; torch's stubs do not know the keyword
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, latents: Tensor) -> Tensor:
        """Images for ``latents``."""
        x = self.project(latents).unflatten(1, self.start).permute(0, 3, 1, 2)  # channels_last
        return self.mean + self.std * self.body(x)


class PlateauDecay:
    """Divide a rate by ten when a loss has not fallen for ``patience`` steps, on its own device.

    As ``torch.optim.lr_scheduler.ReduceLROnPlateau``, which waits for the device every step.

    Args:
        lr: [], the rate, changed in place.
        patience: steps.
        minimum: the rate falls no lower.
    """

    def __init__(self, lr: Tensor, patience: int = PATIENCE, minimum: float = SMALLEST_RATE):
        self.lr, self.patience, self.minimum = lr, patience, minimum
        self.best, self.waited = torch.full_like(lr, torch.inf), torch.zeros_like(lr)

    @torch.no_grad()
    def step(self, loss: Tensor) -> None:
        """Take in the loss [] of one step."""
        better = loss < self.best * (1 - 1e-4)
        self.best = torch.where(better, loss, self.best)
        self.waited = torch.where(better, 0.0, self.waited + 1)
        late = self.waited > self.patience
        self.lr.copy_(torch.where(late, (self.lr / 10).clamp(min=self.minimum), self.lr))
        self.waited = torch.where(late, 0.0, self.waited)


def distilled_batches(
    teacher: nn.Module,
    data: DataSpec,
    config: LatentConfig,
    *,
    rng: torch.Generator,
    report: Report = silent,
) -> Iterator[Images]:
    """Yield ``config.batches`` batches of images distilled from ``teacher``, labeled by it.

    Minimizes ``sum_l bn_mismatch_l + image_weight * mean_n image_mismatch_n`` over generator and
    latents; the images are those of the last step. ``teacher`` is frozen and in eval mode; ``rng``
    is a CPU generator, so that a seed means the same on every device.
    """
    device = next(teacher.parameters()).device
    bfloat16 = config.bfloat16 and has_bfloat16(device)
    moments = image_moments(data)
    generator: nn.Module | None = None
    steps, done = config.steps + config.keep_generator * config.first_steps, 0
    for _ in range(config.batches):
        if generator is None or not config.keep_generator:
            with seeded_layers(rng):
                generator = _generator(data, config).to(device)
        latents = torch.randn(config.batch_size, config.latent_dim, generator=rng).to(device)
        rates = _Rates(generator, latents.requires_grad_(), config)
        swing = swing_convolutions(teacher, rng) if config.swing else nullcontext()
        with capture_bn_statistics(teacher) as stats, swing:
            for step in range(steps):
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    images = generator(latents).float()
                    output = teacher(images)
                bn_loss = bn_mismatch(stats, config.bn_moment).sum()
                image_loss = image_mismatch(images, *moments).mean()
                loss = bn_loss + config.image_weight * image_loss
                rates.set(step, steps, loss.detach())
                descend(loss, rates.generator, rates.latents)
                done += 1
                losses = {"bn_loss": bn_loss.detach(), "image_loss": image_loss.detach()}
                report("synthesize", done, config.total_steps, **losses)
        yield Images(images.detach(), labels(output))
        steps = config.steps


def is_large(shape: Sequence[int]) -> bool:
    """Whether images of ``shape``, [..., H, W], have a side of more than ``LARGE`` pixels."""
    return max(shape[-2:]) > LARGE


def _generator(data: DataSpec, config: LatentConfig) -> nn.Module:
    stages = is_large(data.shape) if config.stages is None else config.stages
    return (StagedGenerator if stages else LatentGenerator)(data, config.latent_dim)


class _Rates:
    """Adam for the generator and for the latents, and how their rates fall over a batch."""

    def __init__(self, generator: nn.Module, latents: Tensor, config: LatentConfig) -> None:
        self.config = config
        self.generator = torch.optim.Adam(generator.parameters(), lr=config.lr)
        on_gpu = latents.is_cuda  # where a rate that is a tensor needs "capturable"
        lr = torch.tensor(config.latent_lr, device=latents.device)
        self.latents = torch.optim.Adam([latents], lr=lr, capturable=on_gpu)
        self.plateau = PlateauDecay(lr)

    def set(self, step: int, steps: int, loss: Tensor) -> None:
        """Set the rates for ``step`` of ``steps``, which has this loss."""
        if self.config.schedule == "genie":
            self.plateau.step(loss)
            for group in self.generator.param_groups:
                group["lr"] = self.config.lr * DECAY ** (step // DECAY_EVERY)
            return
        anneal(self.latents, step / steps)
        if not self.config.keep_generator:
            anneal(self.generator, step / steps)

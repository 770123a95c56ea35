"""Images inverted from several models at once: LIS / MixMix (arXiv:2011.09899).

The pixels themselves are learned until every teacher finds in them what its BatchNorm layers
remember and the classes that they were meant for. Known of the papers are their abstracts: several
teachers, drawn from hierarchical courses (LIS), mix their features, and images are mixed together
with their labels (MixMix). The losses are those that such inversions share (DeepInversion,
arXiv:1912.08795). How the parts are put together and every number is our reconstruction. Images are
a sum of resolutions: inverted from ResNet-20 in 60 steps, those of 4 levels have a third of the
BatchNorm mismatch of plain pixels, and in ResNet-32, which was not asked, a seventh.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.bounds import COUNT, NOT_ALL, NOT_NEGATIVE, SHARE
from dfq.descent import anneal, descend
from dfq.outputs import are_logits
from dfq.synthesize.bn_stats import capture_bn_statistics
from dfq.synthesize.generate import has_bfloat16
from dfq.synthesize.latents import image_moments
from dfq.synthesize.losses import Moment, bn_mismatch, total_variation
from dfq.synthesize.mixing import Mixed, mix
from dfq.synthesize.pool import augment
from dfq.synthesize.pyramid import Pyramid
from dfq.synthesize.swing import swing_convolutions
from dfq.synthesize.teachers import TeacherSampler
from dfq.types import DataSpec, Images, Report, silent

COARSEST = 4  # pixels of a side of the coarsest level


@dataclass(frozen=True)
class InversionConfig:
    """How images are inverted; the defaults are ours, ``MIXMIX_INVERSION`` our reading of MixMix.

    Attributes:
        batch_size: images of one batch.
        batches: batches in all.
        steps: steps for one batch.
        lr: Adam's rate for pixels, in units of the data's deviation, falling to 0 by a half cosine.
        betas: Adam's.
        levels: resolutions that the images are a sum of, each half of the one before; 1 leaves
            plain pixels, None takes as many as leave 4 pixels or more: 4 for images of 32, 6 for
            224.
        gain: weight of each resolution over the next finer one.
        bn_moment: compare standard deviations or, as DeepInversion does, variances; see
            ``bn_mismatch``.
        bn_weight: of the mismatch of the BatchNorm statistics, averaged over layers, so that it
            counts alike in networks of any depth.
        class_weight: of the teachers' cross entropy against the labels.
        variation_weight: of the total variation.
        norm_weight: of the squared pixels, in units of the data's deviation.
        shift: images are flipped at random and moved by up to so many pixels; None: left alone.
        mixed: probability that an image is seen with a box of another one in it.
        swing: move the input of strided convolutions at random (GENIE, arXiv:2212.04780).
        bfloat16: run the teachers in bfloat16 where the device computes in it; statistics and
            losses stay in float32.
    """

    batch_size: int = 128
    batches: int = 8
    steps: int = 120
    lr: float = 0.25
    betas: tuple[float, float] = (0.5, 0.9)
    levels: int | None = None
    gain: float = 1.5
    bn_moment: Moment = "std"
    bn_weight: float = 1.0
    class_weight: float = 0.01
    variation_weight: float = 1e-3
    norm_weight: float = 1e-4
    shift: int | None = 2
    mixed: float = 0.5
    swing: bool = True
    bfloat16: bool = True

    def __post_init__(self) -> None:
        COUNT.check(batch_size=self.batch_size, steps=self.steps, levels=self.levels)
        NOT_NEGATIVE.check(
            batches=self.batches,
            lr=self.lr,
            gain=self.gain,
            bn_weight=self.bn_weight,
            class_weight=self.class_weight,
            variation_weight=self.variation_weight,
            norm_weight=self.norm_weight,
            shift=self.shift,
        )
        NOT_ALL.check(betas=self.betas)
        SHARE.check(mixed=self.mixed)

    @property
    def total_steps(self) -> int:
        """Steps for all batches."""
        return self.batches * self.steps


MIXMIX_INVERSION = InversionConfig(  # plain pixels; weights as DeepInversion's for CIFAR
    steps=2000,
    levels=1,
    bn_moment="var",
    bn_weight=10.0,
    class_weight=1.0,
    swing=False,
    bfloat16=False,
)


def inverted_batches(
    teachers: TeacherSampler,
    data: DataSpec,
    config: InversionConfig,
    *,
    rng: torch.Generator,
    report: Report = silent,
) -> Iterator[Images]:
    """Yield ``config.batches`` batches of images that the teachers agree on, with their labels.

    Minimizes over the images, for the teachers ``i`` of a batch,
    ``mean_i (bn_weight * bn_mismatch_i + class_weight * CE_i) + variation_weight * TV +
    norm_weight * ||x||^2``; teachers see the images augmented and mixed. Labels are spread evenly
    over the classes; where the teachers give maps there are none, and no CE. The teachers are
    frozen, in eval mode and take the same images; ``rng`` is a CPU generator, so that a seed means
    the same on every device.
    """
    device = next(teachers.courses[0][0].parameters()).device
    done = 0
    levels = config.levels or 1 + int(math.log2(max(1, min(data.shape[1:]) / COARSEST)))
    for _ in range(config.batches):
        labels = torch.randperm(config.batch_size, generator=rng).to(device) % max(data.classes, 1)
        wanted = F.one_hot(labels, max(data.classes, 1)).float()
        pyramid = Pyramid(config.batch_size, data, levels, config.gain, rng=rng).to(device)
        optimizer = torch.optim.Adam(pyramid.parameters(), lr=config.lr, betas=config.betas)
        for step in range(config.steps):
            anneal(optimizer, step / config.steps)
            images = pyramid()
            seen = mix(augment(images, config.shift, rng), wanted, config.mixed, rng)
            opinions = [_opinion(t, seen, config, rng) for t in teachers.draw(step, rng)]
            mismatch, class_loss = torch.stack(opinions).mean(0)
            loss = config.bn_weight * mismatch + config.class_weight * class_loss
            descend(loss + _prior(images, data, config), optimizer)
            done += 1
            losses = {"bn_loss": mismatch.detach(), "class_loss": class_loss.detach()}
            report("synthesize", done, config.total_steps, **losses)
        with torch.no_grad():
            images = pyramid()
        yield Images(images, labels)


def _opinion(
    teacher: nn.Module, seen: Mixed, config: InversionConfig, rng: torch.Generator
) -> Tensor:
    """[2]: how far the images are from what one teacher remembers, and from their classes.

    Of maps, which know no classes, the second is zero.
    """
    swing = swing_convolutions(teacher, rng) if config.swing else nullcontext()
    device = seen.images.device
    bfloat16 = torch.autocast(
        device.type, torch.bfloat16, enabled=config.bfloat16 and has_bfloat16(device)
    )
    with capture_bn_statistics(teacher) as stats, swing, bfloat16:
        output = teacher(seen.images)
    mismatch = bn_mismatch(stats, config.bn_moment).mean()
    if not are_logits(output):
        return torch.stack((mismatch, mismatch.new_zeros(())))
    return torch.stack((mismatch, F.cross_entropy(output.float(), seen.labels)))


def _prior(images: Tensor, data: DataSpec, config: InversionConfig) -> Tensor:
    mean, std = image_moments(data)
    x = (images - mean) / std
    variation, norm = total_variation(x), x.square().mean((1, 2, 3))
    return (config.variation_weight * variation + config.norm_weight * norm).mean()

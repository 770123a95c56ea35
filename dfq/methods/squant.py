"""SQuant: on-the-fly data-free quantization (Guo et al., ICLR 2022, arXiv:2202.07471).

No images and no training: weights are rounded so that their errors cancel over every kernel and
every output channel. Seconds for any network, and what every slower method has to beat.

The rounding is the paper's. Ours: activations are calibrated on Gaussian images (theirs are clipped
by the affine parts of BatchNorm; calibrating with the BatchNorms renormalized to the noise, which
does the same for any graph, was no better on ResNet-20 and MobileNetV1), and scales are searched by
the error of rounding, p = 2.4.
"""

from dataclasses import dataclass

import torch
from torch import nn

from dfq.bounds import COUNT
from dfq.prepare import calibrate
from dfq.prepare.squant import balance_rounding
from dfq.synthesize.latents import image_moments
from dfq.types import DataSpec, Images, Report, silent


@dataclass(frozen=True)
class SQuantConfig:
    """Hyper-parameters.

    Attributes:
        images: Gaussian images that activations are calibrated on.
    """

    images: int = 256

    def __post_init__(self) -> None:
        COUNT.check(images=self.images)


SQUANT_EFFORTS = dict.fromkeys(("quick", "default", "full", "paper"), SQuantConfig())


def squant(
    teacher: nn.Module,
    student: nn.Module,
    data: DataSpec,
    config: SQuantConfig,
    *,
    given: Images | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> tuple[nn.Module, Images]:
    """Round ``student``, prepared from ``teacher``, in place; return it and its images."""
    images = given or _noise(teacher, data, config.images, rng)
    calibrate(student, images.images)
    balance_rounding(student)
    report("round", 1, 1)
    return student, images


@torch.no_grad()
def _noise(teacher: nn.Module, data: DataSpec, count: int, rng: torch.Generator) -> Images:
    device = next(teacher.parameters()).device
    mean, std = image_moments(data)
    noise = mean + std * torch.randn(count, *data.shape, generator=rng).to(device)
    return Images(noise, torch.cat([teacher(part).argmax(1) for part in noise.split(64)]))

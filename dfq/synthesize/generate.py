"""Train a generator against a teacher and hand out what it makes, batch by batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfq.bounds import COUNT, NOT_NEGATIVE
from dfq.descent import anneal, descend, seeded_layers
from dfq.outputs import are_logits, cast
from dfq.synthesize.bn_stats import capture_bn_statistics
from dfq.synthesize.generators import ConditionalGenerator, StagedGenerator
from dfq.synthesize.losses import Moment, bn_mismatch
from dfq.types import DataSpec, Images, Report, silent


@dataclass(frozen=True)
class GeneratorConfig:
    """How the generator learns; the defaults are ours, ``GDFQ_GENERATOR`` the paper's.

    GDFQ draws fresh noise for every step. We keep a batch of latents for ``steps_per_batch``
    steps and let it learn with the generator (as GENIE does, arXiv:2212.04780, though it starts a
    new generator for every batch): the statistics of the batch come much closer to the teacher's.

    Attributes:
        batch_size: images of one batch.
        steps_per_batch: generator steps spent on one batch of latents.
        first_steps: further steps for the first batch, when the generator knows nothing yet.
        lr: Adam's rate for the generator; 1e-3 in GDFQ's hocon files.
        latent_lr: Adam's rate for the latents, falling to 0 over a batch; 0.1 in GENIE's code.
        latent_dim: length of a latent; 100 in GDFQ's code, 256 in GENIE's.
        bn_weight: weight of the BatchNorm mismatch, averaged over layers.
        bn_moment: compare standard deviations (GENIE) or variances (GDFQ), see ``bn_mismatch``.
        class_weight: weight of the teacher's cross entropy against the wanted labels.
        bn_eps: epsilon of the generator's BatchNorms.
        bfloat16: run generator and teacher in bfloat16 where the device computes in it; statistics
            and losses stay in float32.
    """

    batch_size: int = 128
    steps_per_batch: int = 60
    first_steps: int = 100
    lr: float = 1e-3
    latent_lr: float = 0.1
    latent_dim: int = 256
    bn_weight: float = 1.0
    bn_moment: Moment = "std"
    class_weight: float = 0.01
    bn_eps: float = 1e-5
    bfloat16: bool = True

    def __post_init__(self) -> None:
        COUNT.check(
            batch_size=self.batch_size,
            steps_per_batch=self.steps_per_batch,
            latent_dim=self.latent_dim,
        )
        NOT_NEGATIVE.check(
            first_steps=self.first_steps,
            lr=self.lr,
            latent_lr=self.latent_lr,
            bn_weight=self.bn_weight,
            class_weight=self.class_weight,
            bn_eps=self.bn_eps,
        )


GDFQ_GENERATOR = GeneratorConfig(  # the authors' cifar100_resnet20.hocon and code
    batch_size=200,
    steps_per_batch=1,
    first_steps=0,
    latent_lr=0.0,
    latent_dim=100,
    bn_weight=0.1,  # a literal in their trainer.py
    bn_moment="var",
    class_weight=1.0,
    bn_eps=0.8,
    bfloat16=False,
)


Criterion = Callable[[Images, Any, Tensor], Tensor]  # (images, output, bn_mismatch) -> loss


def generated_batches(
    teacher: nn.Module,
    data: DataSpec,
    config: GeneratorConfig,
    batches: int,
    *,
    criterion: Criterion | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> Iterator[Images]:
    """Train a generator on ``teacher`` and yield ``batches`` batches as it goes.

    It is a ``ConditionalGenerator``, or without classes a ``StagedGenerator``. Minimizes
    ``criterion`` over it and, if ``latent_lr`` is set, the latents; None is GDFQ's,
    ``class_weight * CE(teacher(x), y) + bn_weight * mean_l bn_mismatch_l``. ``teacher`` is frozen
    and in eval mode; ``rng`` is a CPU generator, so that a seed means the same everywhere.
    """
    device = next(teacher.parameters()).device
    criterion = criterion or partial(gdfq_criterion, config)
    bfloat16 = config.bfloat16 and has_bfloat16(device)
    with seeded_layers(rng):
        generator = _generator(data, config).to(device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr, betas=(0.5, 0.999))
    total, done = config.first_steps + batches * config.steps_per_batch, 0
    for batch in range(batches):
        steps = config.steps_per_batch + (config.first_steps if batch == 0 else 0)
        latents = torch.randn(config.batch_size, config.latent_dim, generator=rng).to(device)
        labels = torch.randint(max(data.classes, 1), (config.batch_size,), generator=rng).to(device)
        optimizers = [optimizer]
        if config.latent_lr:
            optimizers.append(torch.optim.Adam([latents.requires_grad_()], lr=config.latent_lr))
        with capture_bn_statistics(teacher) as stats:
            for step in range(steps):
                for latent_optimizer in optimizers[1:]:
                    anneal(latent_optimizer, step / steps)
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    images = _render(generator, latents, labels)
                    output = cast(teacher(images), torch.float32)
                mismatch = bn_mismatch(stats, config.bn_moment)
                descend(criterion(Images(images, labels), output, mismatch), *optimizers)
                done += 1
                measures = {"bn_loss": mismatch.detach().mean()}
                if data.classes:
                    hits = (output.detach().argmax(1) == labels).float().mean()
                    measures["teacher_accuracy"] = hits
                report("synthesize", done, total, **measures)
        yield Images(images.detach(), labels)


def gdfq_criterion(
    config: GeneratorConfig, images: Images, output: Any, mismatch: Tensor
) -> Tensor:
    """The teacher should recognize the images, and its BatchNorm layers should too.

    The latter alone if it gives maps.
    """
    if not are_logits(output):
        return config.bn_weight * mismatch.mean()
    class_loss = F.cross_entropy(output, images.labels)
    return config.class_weight * class_loss + config.bn_weight * mismatch.mean()


def _generator(data: DataSpec, config: GeneratorConfig) -> nn.Module:
    if data.classes:
        return ConditionalGenerator(data, config.latent_dim, bn_eps=config.bn_eps)
    return StagedGenerator(data, config.latent_dim)


def _render(generator: nn.Module, latents: Tensor, labels: Tensor) -> Tensor:
    if isinstance(generator, ConditionalGenerator):
        return generator(latents, labels).float()
    return generator(latents).float()


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` computes in bfloat16 rather than emulating it, which is slower."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)

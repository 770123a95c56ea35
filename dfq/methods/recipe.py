"""What dfq does when no method is named: the parts that earned their place, in one line-up.

Ours, out of published parts. Half of the images are distilled through a generator (GENIE-D,
arXiv:2212.04780), half are inverted pixel by pixel, mixed by boxes (MixMix, arXiv:2011.09899), from
further models too if there are any: at W2A2 a ResNet-20 that learns from 256 of each comes nearer
to its teacher than from 512 of either (divergence 1.27 against 1.54 and 1.49 on images of another
network). Above 64 pixels, where generators are dear, all are inverted, and without boxes.

Channels that a depthwise layer takes in are first brought to sizes that suit their common grid
(after DFQ, arXiv:1906.04721). Blocks then learn their rounding and their scales one after the other
(GENIE-M). From there the whole student goes on and learns to put out, in every layer, what the
teacher does (PTQ as a warm start for QAT, as in GenQ, arXiv:2312.05272). With many bits nothing is
reconstructed: all channels of the network whose sizes are free are sized for each other (after
SmoothQuant, arXiv:2211.10438), weights are rounded so that each makes up for those before it (GPTQ,
arXiv:2210.17323), and what all rounding did to the means of channels is taken back (DFQ), in about
a minute; grids and student see each image with more contrast too.

A student is judged here by images that it has not learned from and that no data is behind: for
ResNet-20 those distilled from a ResNet-32, for MobileNetV1 x0.25 crops and blends of images that
were distilled with other settings (it gives their likeliest class 0.59 on average), and painted
ones. The distance of all layers is what makes the last part worth its time:

- ResNet-20 at W2A2: divergence 1.51 behind 400 steps a block, 0.96 behind 300 steps more of the
  student at a rate of 1e-3; W3A3: 0.56 behind 200 steps a block, 0.43 behind 200 more. At 1e-4, on
  images the teacher is sure of, W3A3 goes from 0.19 to 0.15; with the divergence of the outputs as
  its loss to 0.17, and with that in addition, times 0.05, to 0.20.
- MobileNetV1 at W4A4: with the divergence of the outputs it comes nearer on distilled images (0.26
  to 0.07) and goes away on painted ones (0.55 to 0.84), so it learns the images, not the network.
  With the distance of all layers it comes nearer on both (0.11, 0.50). At W8A8 75 steps take the
  divergence on crops and blends from 0.032 to 0.016, and the agreement from 82 % to 93 %.

Depthwise layers are held meanwhile. The few weights of a channel may cancel, and the BatchNorm
behind amplify what is left, in MobileNetV1 up to 116 times; all of Adam's steps have one size, and
where the grid has steps of 0.009 nine weights took 45 of them to their next codes, together: the
channel's mean moved by 11 of its deviations, and the student stayed behind where its blocks had
left it (W4A4, 400 steps at 1e-4: divergence on crops and blends from 0.48 to 1.08, painted from
0.39 to 0.68). With the weights held it comes to 0.43 and 0.35, at 3e-4 to 0.38 and 0.36, and with
scales and weights held to 0.36 and 0.34. At W8A8 holding them costs nothing (a detector's distance
0.0334, and 0.0336 if they learn).

Tried on ResNet-20 at W3A3 and W2A2, before the last part, and left out, since the student came no
nearer to its teacher: a low-pass filter on the images (SynQ, ICLR 2025), statistics that are
matched over all images instead of each batch (DGH, arXiv:2410.22110), and channels of dense layers
equalized before a reconstruction, by scales that add the least rounding error (W3A3 0.64 against
0.52).

Tried on a student at W3A3 that learns the outputs from its calibration on (300 steps, 0.51, on
painted images 0.97): SQuant's rounding first (0.56); images superposed, for the boundaries between
classes (as Qimera, arXiv:2111.02625, does with embeddings; 0.52, 0.88); images mixed by boxes
(0.51, 0.75); every other step on images made harder along their gradient (HAST, arXiv:2303.13826;
0.48, 0.67, in 1.6 of the time). Behind its blocks, with the distance of all layers as its loss, the
latter takes a student from 0.19 to 0.21 on images the teacher is sure of, and without it falls to
0.15. AIT (arXiv:2203.17008) chooses rates so that weights still change their codes; here 0.9 % of
them do in the first step and 0.01 % in the last.

Tried on the images of MobileNetV1, for a student at W4A4 and ``quick`` (divergence on crops and
blends, on painted images): 256 of 60 steps (0.40, 0.41); in twice the time 256 of 120 (0.41, 0.31)
or 512 of 60 (0.36, 0.36); 512 of 30 (0.42, 0.54); 256 that are moved by up to 14 pixels instead of
2 (0.39, 0.42), or that the teacher sees in parts of 0.3 of their area and more (0.53, 0.50); 512 of
80 steps at half the resolution and 20 at all of it (0.62, 0.48). With the depthwise layers held,
256 of 120 steps that begin as painted images instead of noise teach as much about crops and blends
(0.38 against 0.36) and less about images inverted from a detector (0.73 against 0.55).

With many bits, not trained, in this order (W8A8; MobileNetV1 on crops and blends, painted images, a
detector's, dead leaves, clouds of 1/f noise; FastestDet's distance on images inverted from
MobileNetV1, painted ones, dead leaves, clouds, its own of another seed): outliers of single layers
shrunk, SQuant, and the means of rounded activations alone 0.0097, 0.077, 0.021, 0.080, 0.0125; all
means 0.0068, 0.066, 0.0146, 0.076, 0.0122, FastestDet 0.128, 0.150, 0.160, 0.098, 0.051; GPTQ for
SQuant 0.0067, 0.058, 0.0144, 0.085, 0.0102 and 0.120, 0.149, 0.159, 0.100, 0.049; all channels
sized 0.0076, 0.029, 0.0166, 0.054, 0.0106 and 0.089, 0.128, 0.129, 0.083, 0.035. Of these images
crops, blends and the detector's count most: the means of MobileNetV1's channels lie 0.2 of their
deviations from those that its BatchNorms remember (the square's root), on the others 0.6.

Nor are the ranges of activations made wider than the least squared error has them: MobileNetV1 at
W8A8, not trained, goes from 0.0129 to 0.0140 with ranges 1.1 times as wide, on a detector's images
from 0.033 to 0.038 (painted 0.050 to 0.047), and FastestDet with the whole span of what it has seen
from 0.055 to 0.061 on its own images. Images of more contrast widen those that edges reach.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from dfq.bounds import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, SOME
from dfq.depthwise import is_depthwise
from dfq.descent import anneal, descend, held_still
from dfq.distill.features import capture_features, feature_distance
from dfq.distill.reconstruct import ReconstructionConfig
from dfq.distill.student import StudentConfig, student_optimizer
from dfq.methods.blockwise import check_learned, reconstruct_blocks
from dfq.prepare import Quantizer, calibrate, split_parameters
from dfq.prepare.equalize import equalize_channels
from dfq.prepare.gptq import compensate_rounding
from dfq.prepare.layers import quantized_layers
from dfq.prepare.means import channel_means, correct_means
from dfq.prepare.sizes import size_channels
from dfq.synthesize.contrast import add_contrast
from dfq.synthesize.crops import random_crops
from dfq.synthesize.inversion import InversionConfig, inverted_batches
from dfq.synthesize.latents import MAPS_LATENTS, LatentConfig, distilled_batches, is_large
from dfq.synthesize.pool import Schedule, gather, lessons
from dfq.synthesize.teachers import TeacherSampler, in_courses
from dfq.types import DataSpec, Images, Report, silent


@dataclass(frozen=True)
class RecipeConfig:
    """Hyper-parameters; all are ours.

    Attributes:
        latents: how images of up to 64 pixels are distilled.
        inversion: how images are inverted.
        reconstruction: how each block learns. ResNet-20 at W4A4 comes as near with 1000 steps of 16
            images as of 32 (0.156 and 0.154; on images the teacher is sure of 0.041 and 0.042), in
            0.63 of the time, and nearer than with 500 of 32 (0.167, 0.055), which take 0.85 of it.
        student: how the whole student learns after its blocks: gently, from where they have come.
            On images the teacher is sure of ResNet-20 at W3A3 falls from 0.19 to 0.15 in 200 steps
            at 1e-4 and rises to 0.22 at 5e-4; at W4A4 from 0.041 to 0.038 in 400, and to 0.044 at
            1e-3; at W2A2 from 0.65 to 0.63, and to 0.69 (but over all images from 1.03 to 1.06, and
            to 0.90). A detector's distance at W8A8, on images of another seed, falls from 0.029 to
            0.025 (at 2e-4 0.026; with the outputs alone at 5e-4 it rose to 0.077), at W4A4 from
            0.154 to 0.137 (at 1e-3 0.142).
        distill_steps: for how many steps; 0 leaves it out.
        distill_batch: images of such a step.
        mirror: blocks learn from the mirror image of each image too. On ResNet-20 this takes the
            divergence from the teacher, on images that were distilled from another network, from
            0.65 to 0.54 at W3A3 and from 1.46 to 1.39 at W2A2 (512 images, 300 steps).
        least_area: of images of more than 64 pixels, blocks learn from the mirror image's part of
            at least so much area, and so does the student from the image's; see ``random_crops``.
            MobileNetV1 at W4A4 comes nearer to its teacher on crops and blends of other images
            (0.70 to 0.58 behind its blocks; 0.41 to 0.31 behind 150 steps of the student). A
            detector sees all of its images: with parts it is further from its teacher, on whole
            images of another seed (0.153 against 0.141 at W4A4). With many bits they bring
            nothing (MobileNetV1 at W8A8 0.018 against 0.016) and all is learned from whole images.
        large_mixed: ``inversion.mixed`` where images have more than 64 pixels. MobileNetV1 at W4A4,
            in the time that ``quick`` learns, comes nearer to its teacher on crops and blends of
            other images from 256 without boxes than from 256 with them in half (120 steps; 0.41
            against 0.50), and on painted images (0.31 against 0.51).
        large_batch: images of a step, of more than 64 pixels, for blocks and student.
        large_steps: and so many times as many steps. MobileNetV1 at W4A4 comes as near with 1200
            steps a block of 8 images as with 600 of 32 (0.33 and 0.33 on crops and blends, 0.46 and
            0.41 on painted images), in 0.54 of the time; from there 600 steps of the student with 8
            images take 0.34 to 0.29, and 150 with 32 images, in the same time, to 0.36.
        large_lr: and the rate of the student's weights, behind its blocks. MobileNetV1 at W4A4, the
            weights of depthwise layers held, goes in 1600 steps from 0.48 to 0.31 at 1e-4, to 0.29
            at 3e-4 and to 0.32 at 1e-3, on painted images from 0.39 to 0.31, 0.29 and 0.43; in 400
            steps at 1e-4 to 0.43, at 3e-4 to 0.38 (0.35 and 0.36).
        many_lr: and that rate with many bits. A student that is sized and rounded well has little
            left to learn. MobileNetV1 at W8A8 goes in 400 steps from 0.0076 to 0.0062 on crops and
            blends at 2e-5, and to 0.0070 at 1e-4, on painted images from 0.0295 to 0.0285 and
            0.0311, on a detector's from 0.0166 to 0.0129 and 0.0147. FastestDet goes from 0.0866 to
            0.0800 on images inverted from MobileNetV1 in 200 steps at 2e-5, in 400 at 1e-4 to
            0.0833, on painted ones from 0.111 to 0.106 and 0.107, and on clouds from 0.079 to 0.080
            and 0.111.
        low_bits: with fewer, blocks and student learn for twice as many steps.
        many_bits: with so many or more, weights are rounded at once and nothing is reconstructed.
            The fewest bits count that the student has anywhere, of weights or activations.
        contrast: and sizes, grids and student see each image with so many times its contrast too,
            see ``add_contrast``; 1 leaves that out. Weights are rounded, and means taken back, by
            images as they are: MobileNetV1 comes to 0.0062 on crops and blends by them, to 0.0075
            by both. Before channels were sized together, at W8A8 and behind the student's steps in
            ``quick``, it came from 0.0069 to 0.0063 on crops and blends of other images,
            from 0.085 to 0.065 on painted ones and from 0.0141 to 0.0134 on a detector's, and to
            0.0062, 0.060 and 0.0136 with the means taken back; a detector's distance goes with both
            from 0.184 to 0.146 on painted images, from 0.178 to 0.158 on plain dead leaves, from
            0.108 to 0.097 on clouds, and from 0.109 to 0.115 and 0.045 to 0.048 on images inverted
            from MobileNetV1 and from itself. With 2 MobileNetV1, not trained, lies further away on
            crops and blends than with 1.5 (0.0125 against 0.0097), with 1.25 as near (0.0101) but
            further on painted images (0.089 against 0.077).

    Raises:
        InputError: a number is out of its bounds.
    """

    latents: LatentConfig = field(default_factory=lambda: LatentConfig(batches=4))
    inversion: InversionConfig = field(default_factory=lambda: InversionConfig(batches=4))
    reconstruction: ReconstructionConfig = field(
        default_factory=lambda: ReconstructionConfig(1000, 16)
    )
    student: StudentConfig = field(default_factory=lambda: StudentConfig(1e-4, 5e-5))
    distill_steps: int = 750
    distill_batch: int = 64
    mirror: bool = True
    least_area: float = 0.3
    large_mixed: float = 0.0
    large_batch: int = 8
    large_steps: int = 4
    large_lr: float = 3e-4
    many_lr: float = 2e-5
    low_bits: int = 4
    many_bits: int = 7
    contrast: float = 1.5

    def __post_init__(self) -> None:
        COUNT.check(
            distill_batch=self.distill_batch,
            large_batch=self.large_batch,
            large_steps=self.large_steps,
        )
        NOT_NEGATIVE.check(
            distill_steps=self.distill_steps,
            large_lr=self.large_lr,
            many_lr=self.many_lr,
            low_bits=self.low_bits,
            many_bits=self.many_bits,
        )
        SOME.check(least_area=self.least_area)
        POSITIVE.check(contrast=self.contrast)
        SHARE.check(large_mixed=self.large_mixed)

    def image_count(self, data: DataSpec) -> int:
        """How many images of that shape it makes."""
        return sum(part.batches * part.batch_size for part in _shares(data, self, None))


_QUICK = RecipeConfig(
    LatentConfig(batches=2, steps=60, first_steps=40),
    InversionConfig(batches=2, steps=60, mixed=0.0),  # boxes take steps to be worth them
    ReconstructionConfig(steps=120),
    distill_steps=100,
)
_FULL = RecipeConfig(
    LatentConfig(batches=8, steps=200),
    InversionConfig(batches=8, steps=400),
    ReconstructionConfig(steps=4000),
    distill_steps=5000,
)
# there is no paper of it
RECIPE_EFFORTS = {"quick": _QUICK, "default": RecipeConfig(), "full": _FULL}


def _for_maps(batches: int, steps: int, distill_steps: int) -> RecipeConfig:
    """A detector's activations may be of any scale."""
    return RecipeConfig(
        replace(MAPS_LATENTS, batch_size=32, batches=batches),
        InversionConfig(batch_size=32, batches=batches, steps=60, mixed=0.0, bn_moment="relative"),
        ReconstructionConfig(steps),
        distill_steps=distill_steps,
        least_area=1.0,
        large_steps=1,
        large_lr=1e-4,
    )


RECIPE_MAPS = {
    "quick": _for_maps(2, 200, 400),
    "default": _for_maps(4, 1000, 1000),
    "full": _for_maps(8, 2000, 4000),
}


def recipe(
    teacher: nn.Module,
    student: nn.Module,
    data: DataSpec,
    config: RecipeConfig,
    *,
    teachers: Sequence[nn.Module] = (),
    given: Images | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> tuple[nn.Module, Images]:
    """Train ``student``, prepared from ``teacher``, in place; return it and its images."""
    check_learned(student)
    images = given or recipe_images(
        teacher, data, config, teachers=teachers, rng=rng, report=report
    )
    bits, taught, shown = fewest_bits(student), images, images.images
    equalize_channels(student, shown)
    config = _fit(config, bits, large=is_large(shown.shape))
    if bits < config.many_bits:
        if config.mirror:
            mirrored = random_crops(shown.flip(-1), config.least_area, rng)
            shown = torch.cat((shown, mirrored))
        reconstruct_blocks(student, shown, config.reconstruction, rng=rng, report=report)
    else:
        taught = add_contrast(images, data, config.contrast)
        size_channels(student, taught.images)
        calibrate(student, taught.images)
        means = channel_means(student, shown)
        compensate_rounding(student, shown)
        correct_means(student, shown, means)
    if config.distill_steps:
        _distill(teacher, student, taught, config, rng, report)
    return student, images


def fewest_bits(student: nn.Module) -> int:
    """The least bits of a weight or an activation of a prepared ``student``."""
    return min(m.spec.bits for m in student.modules() if isinstance(m, Quantizer))


def recipe_images(
    teacher: nn.Module,
    data: DataSpec,
    config: RecipeConfig,
    *,
    teachers: Sequence[nn.Module] = (),
    count: int | None = None,
    rng: torch.Generator,
    report: Report = silent,
) -> Images:
    """Make ``count`` images, half of them each way, or as many as ``config`` says."""
    distilled, inverted = _shares(data, config, count)
    first = distilled.total_steps if distilled.batches else 0

    def tell(before: int, stage: str, step: int, steps: int, **values: Tensor | float) -> None:
        report(stage, before + step, first + inverted.total_steps, **values)

    parts = []
    if distilled.batches:
        batches = distilled_batches(teacher, data, distilled, rng=rng, report=partial(tell, 0))
        parts.append(gather(batches))
    if inverted.batches:
        everyone = TeacherSampler(in_courses((teacher, *teachers), ()))
        batches = inverted_batches(everyone, data, inverted, rng=rng, report=partial(tell, first))
        parts.append(gather(batches))
    return gather(parts, count)


def _shares(
    data: DataSpec, config: RecipeConfig, count: int | None
) -> tuple[LatentConfig, InversionConfig]:
    """How many batches are made each way, and how many large images are seen with boxes."""
    distilled, inverted = config.latents, config.inversion
    if is_large(data.shape):
        distilled = replace(distilled, batches=0)
        inverted = replace(inverted, mixed=config.large_mixed)
    if count:
        half = -(-count // 2) if distilled.batches else 0
        distilled = replace(distilled, batches=-(-half // distilled.batch_size))
        rest = max(0, count - distilled.batches * distilled.batch_size)
        inverted = replace(inverted, batches=-(-rest // inverted.batch_size))
    return distilled, inverted


def _fit(config: RecipeConfig, bits: int, *, large: bool) -> RecipeConfig:
    """``config`` for a student of so many bits, and for images of more than 64 pixels or not."""
    blocks, batch = config.reconstruction, config.distill_batch
    many, longer = bits >= config.many_bits, 1
    harder = large and not many
    if bits < config.low_bits:
        longer *= 2
    lr = config.many_lr if many else config.large_lr if large else config.student.lr
    if large:
        longer *= config.large_steps
        blocks, batch = replace(blocks, batch_size=config.large_batch), config.large_batch
    return replace(
        config,
        reconstruction=replace(blocks, steps=longer * blocks.steps),
        distill_steps=longer * config.distill_steps,
        distill_batch=batch,
        student=replace(config.student, lr=lr),
        least_area=config.least_area if harder else 1.0,
    )


def _distill(
    teacher: nn.Module,
    student: nn.Module,
    images: Images,
    config: RecipeConfig,
    rng: torch.Generator,
    report: Report,
) -> None:
    optimizer = student_optimizer(*split_parameters(student), config.student)
    schedule = Schedule(
        1, 1, 1, config.distill_steps, config.distill_batch, least_area=config.least_area
    )
    layers = quantized_layers(student)
    depthwise = nn.ModuleList(layer for layer in layers.values() if is_depthwise(layer))
    with (
        held_still(depthwise),
        capture_features(teacher, layers) as wanted,
        capture_features(student, layers) as shown,
    ):
        for lesson in lessons([images], schedule, rng=rng):
            anneal(optimizer, lesson.step / lesson.steps, config.student.milestones)
            with torch.no_grad():
                teacher(lesson.images)
            student(lesson.images)
            distance = feature_distance(shown, wanted, shown).mean()
            descend(distance, optimizer)
            report("distill", lesson.step + 1, lesson.steps, features=distance.detach())

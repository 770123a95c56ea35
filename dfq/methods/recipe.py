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
deviations from those that its BatchNorms remember (the square's root), on the others 0.6. Learning
takes MobileNetV1 to 0.0062, 0.0285, 0.0129, 0.054, 0.0064; with the scales of rows of up to 32
weights chosen by the error that GPTQ leaves, which not trained is a gain (0.0073, 0.0284, 0.0146,
0.055, 0.0065), to 0.0067, 0.0270, 0.0137, 0.057, 0.0104.

Nor are the ranges of activations made wider than the least squared error has them: MobileNetV1 at
W8A8, not trained, goes from 0.0129 to 0.0140 with ranges 1.1 times as wide, on a detector's images
from 0.033 to 0.038 (painted 0.050 to 0.047), and FastestDet with the whole span of what it has seen
from 0.055 to 0.061 on its own images. Images of more contrast widen those that edges reach.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dfq.depthwise import is_depthwise
from dfq.descent import anneal, descend, held_still
from dfq.distill.features import capture_features, feature_distance
from dfq.distill.student import student_optimizer
from dfq.methods.blockwise import check_learned, reconstruct_blocks
from dfq.methods.recipe_config import RecipeConfig
from dfq.prepare import Quantizer, calibrate, split_parameters
from dfq.prepare.equalize import equalize_channels
from dfq.prepare.gptq import compensate_rounding
from dfq.prepare.layers import quantized_layers
from dfq.prepare.means import channel_means, correct_means
from dfq.prepare.sizes import size_channels
from dfq.synthesize.contrast import add_contrast
from dfq.synthesize.crops import random_crops
from dfq.synthesize.inversion import inverted_batches
from dfq.synthesize.latents import distilled_batches, is_large
from dfq.synthesize.pool import Schedule, gather, lessons
from dfq.synthesize.teachers import TeacherSampler, in_courses
from dfq.types import DataSpec, Images, Report, silent


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
    config = config.fitted(bits, large=is_large(shown.shape))
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
    distilled, inverted = config.ways(data, count)
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

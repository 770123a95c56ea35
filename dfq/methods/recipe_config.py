"""How much of everything ``dfq.methods.recipe`` does, and what that was chosen by.

Divergences from the teacher of ResNet-20 and MobileNetV1 x0.25, and distances of a detector,
FastestDet, from its own, on images that the student has not learned from; ``dfq.methods.recipe``
tells which.

``reconstruction``: ResNet-20 at W4A4 comes as near with 1000 steps of 16 images as of 32 (0.156 and
0.154; on images the teacher is sure of 0.041 and 0.042), in 0.63 of the time, and nearer than with
500 of 32 (0.167, 0.055), which take 0.85 of it.

``student``: on images the teacher is sure of ResNet-20 at W3A3 falls from 0.19 to 0.15 in 200 steps
at 1e-4 and rises to 0.22 at 5e-4; at W4A4 from 0.041 to 0.038 in 400, and to 0.044 at 1e-3; at W2A2
from 0.65 to 0.63, and to 0.69 (but over all images from 1.03 to 1.06, and to 0.90). A detector's
distance at W8A8, on images of another seed, falls from 0.029 to 0.025 (at 2e-4 0.026; with the
outputs alone at 5e-4 it rose to 0.077), at W4A4 from 0.154 to 0.137 (at 1e-3 0.142).

``mirror``: on images that were distilled from another network ResNet-20 comes from 0.65 to 0.54 at
W3A3 and from 1.46 to 1.39 at W2A2 (512 images, 300 steps).

``least_area``: MobileNetV1 at W4A4 comes nearer on crops and blends of other images (0.70 to 0.58
behind its blocks; 0.41 to 0.31 behind 150 steps of the student). A detector sees all of its images:
with parts it is further from its teacher, on whole images of another seed (0.153 against 0.141 at
W4A4). With many bits they bring nothing (MobileNetV1 at W8A8 0.018 against 0.016).

``large_mixed``: MobileNetV1 at W4A4, in the time that ``quick`` learns, comes nearer on crops and
blends of other images from 256 without boxes than from 256 with them in half (120 steps; 0.41
against 0.50), and on painted images (0.31 against 0.51).

``large_batch``, ``large_steps``: MobileNetV1 at W4A4 comes as near with 1200 steps a block of 8
images as with 600 of 32 (0.33 and 0.33 on crops and blends, 0.46 and 0.41 on painted images), in
0.54 of the time; from there 600 steps of the student with 8 images take 0.34 to 0.29, and 150 with
32 images, in the same time, to 0.36.

``large_lr``: MobileNetV1 at W4A4, the weights of depthwise layers held, goes in 1600 steps from
0.48 to 0.31 at 1e-4, to 0.29 at 3e-4 and to 0.32 at 1e-3, on painted images from 0.39 to 0.31, 0.29
and 0.43; in 400 steps at 1e-4 to 0.43, at 3e-4 to 0.38 (0.35 and 0.36). With scales that learn at
1e-3 it comes in these 400 steps to 0.35, on painted images to 0.73, at 5e-5 to 0.33 and 0.60.

``many_lr``: MobileNetV1 at W8A8 goes in 400 steps from 0.0076 to 0.0062 on crops and blends at
2e-5, and to 0.0070 at 1e-4, on painted images from 0.0295 to 0.0285 and 0.0311, on a detector's
from 0.0166 to 0.0129 and 0.0147. FastestDet goes from 0.0866 to 0.0800 on images inverted from
MobileNetV1 in 200 steps at 2e-5, in 400 at 1e-4 to 0.0833, on painted ones from 0.111 to 0.106 and
0.107, and on clouds from 0.079 to 0.080 and 0.111.

``contrast``: weights rounded and means taken back by images as they are bring MobileNetV1 to 0.0062
on crops and blends, by both contrasts to 0.0075. Before channels were sized together, at W8A8 and
behind the student's steps in ``quick``, 1.5 took it from 0.0069 to 0.0063 on crops and blends of
other images, from 0.085 to 0.065 on painted ones and from 0.0141 to 0.0134 on a detector's, and to
0.0062, 0.060 and 0.0136 with the means taken back; a detector's distance goes with both from 0.184
to 0.146 on painted images, from 0.178 to 0.158 on plain dead leaves, from 0.108 to 0.097 on clouds,
and from 0.109 to 0.115 and 0.045 to 0.048 on images inverted from MobileNetV1 and from itself. With
2 MobileNetV1, not trained, lies further away on crops and blends than with 1.5 (0.0125 against
0.0097), with 1.25 as near (0.0101) but further on painted images (0.089 against 0.077).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dfq.bounds import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, SOME
from dfq.distill.reconstruct import ReconstructionConfig
from dfq.distill.student import StudentConfig
from dfq.synthesize.inversion import InversionConfig
from dfq.synthesize.latents import MAPS_LATENTS, LatentConfig, is_large
from dfq.types import DataSpec


@dataclass(frozen=True)
class RecipeConfig:
    """Hyper-parameters; all are ours.

    Attributes:
        latents: how images of up to 64 pixels are distilled.
        inversion: how images are inverted.
        reconstruction: how each block learns.
        student: how the whole student learns after its blocks: gently, from where they have come.
        distill_steps: for how many steps the whole student learns; 0 leaves it out.
        distill_batch: images of such a step.
        mirror: blocks learn from the mirror image of each image too.
        least_area: of images of more than 64 pixels, blocks learn from the mirror image's part of
            at least so much area, and so does the student from the image's; see ``random_crops``.
            With many bits all is learned from whole images.
        large_mixed: ``inversion.mixed`` where images have more than 64 pixels.
        large_batch: images of a step, for blocks and student, if they have more than 64 pixels.
        large_steps: so many times as many steps are taken with them.
        large_lr: rate of the whole student's weights with them.
        many_lr: that rate with many bits, where little is left to learn.
        low_bits: with fewer, blocks and student learn for twice as many steps.
        many_bits: with so many or more, weights are rounded at once and nothing is reconstructed.
            The fewest bits count that the student has anywhere, of weights or activations.
        contrast: with many bits sizes, grids and student see each image with so many times its
            contrast too, see ``add_contrast``; 1 leaves that out. Weights are rounded, and means
            taken back, by images as they are.

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
        return sum(way.batches * way.batch_size for way in self.ways(data, None))

    def ways(self, data: DataSpec, count: int | None) -> tuple[LatentConfig, InversionConfig]:
        """How many batches are made each way, and how many large images are seen with boxes."""
        distilled, inverted = self.latents, self.inversion
        if is_large(data.shape):
            distilled = replace(distilled, batches=0)
            inverted = replace(inverted, mixed=self.large_mixed)
        if count:
            half = -(-count // 2) if distilled.batches else 0
            distilled = replace(distilled, batches=-(-half // distilled.batch_size))
            rest = max(0, count - distilled.batches * distilled.batch_size)
            inverted = replace(inverted, batches=-(-rest // inverted.batch_size))
        return distilled, inverted

    def fitted(self, bits: int, *, large: bool) -> RecipeConfig:
        """For a student of so many bits, and for images of more than 64 pixels or not."""
        blocks, batch = self.reconstruction, self.distill_batch
        many, longer = bits >= self.many_bits, 2 if bits < self.low_bits else 1
        lr = self.many_lr if many else self.large_lr if large else self.student.lr
        if large:
            longer *= self.large_steps
            blocks, batch = replace(blocks, batch_size=self.large_batch), self.large_batch
        return replace(
            self,
            reconstruction=replace(blocks, steps=longer * blocks.steps),
            distill_steps=longer * self.distill_steps,
            distill_batch=batch,
            student=replace(self.student, lr=lr),
            least_area=self.least_area if large and not many else 1.0,
        )


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

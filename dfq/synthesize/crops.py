"""Parts of images, stretched to the size of the whole: more to learn from the same images.

The random resized crop that classifiers of large images are trained with (Inception,
arXiv:1409.4842), so that networks know what it shows. An image that was synthesized lies where its
teacher is sure of it; a part of it lies further out, as photographs do.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.bounds import SOME

PROPORTIONS = 4 / 3  # of the sides of a part, at most, to those of the image


def random_crops(images: Tensor, least_area: float, rng: torch.Generator) -> Tensor:
    """Show of each image a part that lies anywhere in it; [B, C, H, W] -> [B, C, H, W].

    A part takes ``least_area`` to all of the area, uniformly drawn, its sides are to those of the
    image as 3:4 to 4:3, evenly in logarithms; a side that would be longer than the image's is cut.
    Pixels between pixels are interpolated (bilinear). 1 leaves the images alone. ``rng`` is a CPU
    generator.

    Raises:
        InputError: ``least_area`` is not above 0 and at most 1.
    """
    SOME.check(least_area=least_area)
    if least_area == 1:
        return images
    area, proportions, right, down = torch.rand(4, len(images), generator=rng)
    side = torch.lerp(torch.tensor(least_area), torch.tensor(1.0), area).sqrt()
    stretch = (math.log(PROPORTIONS) * (proportions - 0.5)).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    none = torch.zeros(len(images))
    boxes = torch.stack(  # of each row of the result: from -1 to 1 is the whole image
        (
            torch.stack((width, none, (1 - width) * (2 * right - 1)), 1),
            torch.stack((none, height, (1 - height) * (2 * down - 1)), 1),
        ),
        1,
    ).to(images)
    grid = F.affine_grid(boxes, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

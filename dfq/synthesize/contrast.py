"""Images of more contrast: further out than those that were synthesized.

Synthesized images have the means and variances that a network remembers, but few of the large
values that sharp edges give its layers: a grid that just holds theirs cuts the latter off.
On painted images (overlapping shaded discs and boxes, with noise on them) up to 2 % of the inputs
of some layers of FastestDet at W8A8 leave their grids, by up to 2.5 times the whole range.
"""

import torch

from dfq.bounds import POSITIVE
from dfq.synthesize.teachers import normalization
from dfq.types import DataSpec, Images


def add_contrast(images: Images, data: DataSpec, factor: float) -> Images:
    """``images``, and behind them each with ``factor`` times the contrast, cut to 0..1.

    A pixel p in 0..1, before it is normalized, becomes ``(p - 1/2) * factor + 1/2``; labels stay.
    A factor of 1 adds nothing.

    Raises:
        InputError: ``factor`` is not above 0.
    """
    POSITIVE.check(factor=factor)
    if factor == 1:
        return images
    mean, std = torch.tensor(normalization(data)).to(images.images)[:, :, None, None]
    pixels = images.images * std + mean
    stretched = (((pixels - 0.5) * factor + 0.5).clamp(0, 1) - mean) / std
    return Images(torch.cat((images.images, stretched)), images.labels.repeat(2))

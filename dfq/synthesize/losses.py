"""How far images are from what a model remembers of its training data. Unreduced over layers."""

from typing import Literal

import torch
from torch import Tensor

from dfq.synthesize.bn_stats import BNStatistics

_EPS = 1e-6  # the square root has no gradient at 0


Moment = Literal["std", "var", "relative"]


def bn_mismatch(stats: BNStatistics, moment: Moment = "std") -> Tensor:
    """Squared distance of batch to stored statistics, averaged over channels; [layers].

    ``mean_c (m^_c - m_c)^2 + mean_c (s^_c - s_c)^2`` with ``s`` the standard deviation (GENIE,
    arXiv:2212.04780) or the variance (GDFQ, arXiv:2003.03603). "relative" is GENIE's divided by the
    layer's ``mean_c s_c^2``, so that no layer counts for the scale of its activations.
    """
    terms = []
    for mean, var, batch_mean, batch_var in zip(
        stats.stored_mean, stats.stored_var, stats.batch_mean, stats.batch_var, strict=True
    ):
        spread, batch_spread = var, batch_var
        if moment != "var":
            spread, batch_spread = (var + _EPS).sqrt(), (batch_var + _EPS).sqrt()
        term = (batch_mean - mean).square().mean() + (batch_spread - spread).square().mean()
        terms.append(term / spread.square().mean() if moment == "relative" else term)
    return torch.stack(terms)


def image_mismatch(images: Tensor, mean: float, std: float) -> Tensor:
    """Squared distance of each image's pixels to the data's mean and deviation; [B, C, ...] -> [B].

    ``mean_c (m_nc - m)^2 + mean_c (s_nc - s)^2`` over the channels c of image n, in units of the
    data's deviation: GENIE's pull of every single image towards normalized data.
    """
    var, means = torch.var_mean(images.flatten(2), dim=2)  # [B, C]
    gap = (means - mean) / std
    spread = (var + _EPS).sqrt() / std - 1
    return (gap.square() + spread.square()).mean(1)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighboring pixels, down and across; [B, C, H, W] -> [B]."""
    down, across = images.diff(dim=2).abs(), images.diff(dim=3).abs()
    return down.mean((1, 2, 3)) + across.mean((1, 2, 3))

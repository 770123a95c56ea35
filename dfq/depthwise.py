"""Depthwise layers: each channel of such a convolution has weights of its own, and few of them."""

from torch import nn


def is_depthwise(layer: object) -> bool:
    """Whether every channel of a convolution sees one channel alone, of several that there are."""
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1

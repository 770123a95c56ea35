"""A detector of a second: two maps of different sizes, no classes, for the tests of maps."""

from pathlib import Path

import torch
from torch import nn

from dfq.types import DataSpec

MODEL = f"{Path(__file__)}:detector"
DATA = DataSpec((3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
FLAGS = ["--shape", "3,16,16", "--mean", ".5,.5,.5", "--std", ".25,.25,.25"]


def _layer(inputs, outputs, stride=1, groups=1):
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Detector(nn.Module):
    """Channels are sliced and joined, one head is depthwise, one map is enlarged."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = _layer(3, 8, 2), _layer(4, 4)
        self.down, self.head = _layer(8, 8, 2), _layer(16, 16, groups=16)
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat((x[:, 0::2], self.branch(x[:, 1::2])), 1)
        small = self.down(x)
        wide = nn.functional.interpolate(small, scale_factor=2.0)
        boxes = self.boxes(self.head(torch.cat((x, wide), 1)))
        return {"boxes": boxes, "scores": self.scores(small).sigmoid()}


def detector() -> nn.Module:
    """Always the same weights, and statistics that these weights give."""
    rng = torch.Generator().manual_seed(7)
    model = Detector()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=rng)
        model(torch.randn(256, 3, 16, 16, generator=rng))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model(torch.randn(256, 3, 16, 16, generator=rng))
    return model.eval()

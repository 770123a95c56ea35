"""Known networks, untrained, with BatchNorm statistics of noise: for their speed."""

import torch
import torch.nn.functional as F
from torch import nn

from dfq.deploy import freeze
from dfq.models.cifar import CifarResNet
from dfq.prepare import calibrate, prepare


def normed(inputs, outputs, kernel, stride=1, groups=1):
    padding = kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """A residual block of ResNet-18 (two 3x3) or ResNet-50 (1x1, 3x3, 1x1)."""

    def __init__(self, inputs, width, stride, *, bottleneck):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            layers = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            layers = [(inputs, width, 3, stride), (width, width, 3, 1)]
        self.layers = nn.ModuleList(normed(*layer) for layer in layers)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else normed(inputs, outputs, 1, stride)

    def forward(self, x):
        y = x
        for layer in self.layers[:-1]:
            y = F.relu(layer(y))
        return F.relu(self.layers[-1](y) + self.shortcut(x))


def resnet(counts, *, bottleneck=False, classes=1000):
    """ResNet-18 with two blocks a stage (arXiv:1512.03385)."""
    blocks, inputs = [], 64
    for stage, count in enumerate(counts):
        width = 64 * 2**stage
        for index in range(count):
            stride = 2 if stage and index == 0 else 1
            blocks.append(Block(inputs, width, stride, bottleneck=bottleneck))
            inputs = 4 * width if bottleneck else width
    stem = [normed(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*stem, *blocks, *head)


def mobilenet_v1(classes=1000):
    """Depthwise 3x3 and 1x1 convolutions by turns (arXiv:1704.04861)."""
    layers, inputs = [normed(3, 32, 3, 2), nn.ReLU()], 32
    outputs = [64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    for index, width in enumerate(outputs):
        stride = 2 if index in (1, 3, 5, 11) else 1
        layers += [normed(inputs, inputs, 3, stride, inputs), nn.ReLU()]
        layers += [normed(inputs, width, 1), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, classes))


def tiny():
    layers = [normed(3, 64, 3, 2), nn.ReLU(), normed(64, 64, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 3))


MAKERS = {
    "ResNet-18": lambda: resnet((2, 2, 2, 2)),
    "ResNet-50": lambda: resnet((3, 4, 6, 3), bottleneck=True),
    "MobileNetV1": mobilenet_v1,
    "ResNet-20": lambda: CifarResNet(20),
    "tiny": tiny,
}


def build(name, images):
    """One of ``MAKERS`` in eval mode, in channels_last, that has seen ``images``."""
    network = MAKERS[name]().to(images.device).requires_grad_(False)
    with torch.no_grad():
        network.train()(images)
    return network.eval().to(memory_format=torch.channels_last)


def students(network, images, bits):
    """The fake-quantized network, and the integer model made of it."""
    student = prepare(network, bits)
    calibrate(student, images)
    return student.eval(), freeze(student, tuple(images.shape[1:]))

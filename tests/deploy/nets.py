"""Small networks with what real ones are made of."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.prepare.test_adds import Residual


class Depthwise(nn.Module):
    """MobileNetV2: expansion, depthwise, linear bottleneck, ReLU6, and a residual addition."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.body = nn.Sequential(
            nn.Conv2d(8, 24, 1, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU6(),
            nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
            nn.BatchNorm2d(24),
            nn.ReLU6(),
            nn.Conv2d(24, 8, 1, bias=False),
            nn.BatchNorm2d(8),
        )
        self.pool, self.drop, self.head = nn.AdaptiveAvgPool2d(1), nn.Dropout(), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.body(x)
        return self.head(self.drop(torch.flatten(self.pool(x), 1)))


class Dense(nn.Module):
    """Concatenation, a branch that is read on two grids, average pooling, squeeze-excitation."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.gate, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 6, 1)
        self.leaky, self.head = nn.LeakyReLU(0.1), nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = torch.cat([x, self.leaky(self.second(x))], 1)
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        x = F.avg_pool2d(self.last(x), 2)
        return self.head(x.mean(3).mean(2))


class Plain(nn.Module):
    """Max pooling between layers, padding on its own, a flattened map into a linear layer."""

    def __init__(self):
        super().__init__()
        self.pad = nn.ZeroPad2d(1)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.next = nn.Conv2d(8, 4, (3, 1), (2, 1), "valid")
        self.head = nn.Sequential(
            nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 5)
        )

    def forward(self, x):
        x = self.pool(self.relu(self.norm(self.conv(self.pad(x)))))
        x = F.relu(self.next(x))
        return self.head(x.view(-1, 16))


class Branches(nn.Module):
    """Inception: branches side by side, one of them pooled, and read by one layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, padding=1)
        self.narrow, self.norm = nn.Conv2d(8, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.last, self.head = nn.Conv2d(19, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        pooled = F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([F.relu(self.wide(x)), self.norm(self.narrow(x)), pooled], dim=1)
        return self.head(self.last(x).mean((2, 3)))


NETS = {
    "residual": Residual,
    "depthwise": Depthwise,
    "dense": Dense,
    "plain": Plain,
    "branches": Branches,
}


def build(name, seed=0):
    """An untrained network whose BatchNorms have seen something."""
    torch.manual_seed(seed)
    model = NETS[name]().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model

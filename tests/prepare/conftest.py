import pytest
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """Control flow, a functional ReLU, groups, dilation, a residual add and a dict as output."""

    def __init__(self, channels=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        if x.shape[-1] > 2:
            x = x + F.relu(self.grouped(x))
        return {"logits": self.head(self.pointwise(x).mean((2, 3))), "features": x}


def _build(channels=3):
    net = Net(channels)
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2.0)
    return net.eval().requires_grad_(False)


@pytest.fixture
def net():
    return _build()


@pytest.fixture
def make_net():
    return _build


@pytest.fixture
def images():
    return torch.randn(10, 3, 8, 8)

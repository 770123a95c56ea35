"""Whatever is left free may be scaled at random: the network computes what it did."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfq.prepare import prepare
from dfq.prepare.channels import find_channels
from dfq.prepare.quantizer import Quantizer
from dfq.types import DataSpec

DATA = DataSpec((3, 8, 8), classes=5)
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5))


class Net(nn.Module):
    """Two BatchNorms of 8 channels, what is done with them, two layers behind, a head."""

    def __init__(self, way, inputs=8, bits=None, **parts):
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.one, self.two = nn.Conv2d(inputs, 6, 3, padding=1), nn.Conv2d(inputs, 6, 1)
        self.head, self.way = nn.Linear(6, 5), way
        for name, part in parts.items():
            setattr(self, name, part)
        for norm in (self.first, self.second):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        x = self.way(self, *(norm(self.stem(x)) for norm in (self.first, self.second)))
        x, more = x if isinstance(x, tuple) else (x, None)
        return self.head(x.mean((2, 3))), more


def _shuffled(net, a, b):
    x = torch.cat((a, b), 1)
    x = x.reshape(x.shape[0], 2, 8, x.shape[2], x.shape[3]).transpose(1, 2).flatten(1, 2)
    c, d = x.chunk(2, 1)
    return net.one(c.relu()) + net.two(F.leaky_relu(d, 0.1))


def _padded(net, a, b):
    x = F.pad(a[:, ::2, ::2, ::2], (0, 0, 0, 0, 2, 2))
    return net.one(x) + net.two(F.max_pool2d(b, 2))


def _resized(net, a, b):
    small = F.avg_pool2d(F.relu(a), 2)
    return net.one(F.interpolate(small, scale_factor=2.0, mode="nearest")) + net.two(net.pool(b))


def _changed(net, a, b):
    a.mul_(2.0)
    return net.one(a) + net.two(b)


FREE = {  # how many sizes each way leaves free: all ways below keep what the network computes
    "read by one each": (lambda net, a, b: net.one(a.relu()) + net.two(F.relu(b)), 16),
    "read by both": (lambda net, a, b: net.one(a) + net.two(a) + net.two.bias.sum(), 8),
    "added": (lambda net, a, b: net.one(F.relu(a + b)), 8),
    "added in place": (lambda net, a, b: net.one(F.relu_(a.add_(b))), 8),
    "shuffled": (_shuffled, 16),
    "some of them": (lambda net, a, b: net.one(torch.cat((a[:, :2], b[:, 2:]), 1)), 8),
    "padded in space": (
        lambda net, a, b: net.one(F.pad(a, (1, 1, 1, 1))) + F.pad(net.two(b), 4 * (1,)),
        16,
    ),
    "padded channels": (_padded, 12),
    "resized": (_resized, 16),
    "kept by modules": (
        lambda net, a, b: net.one(net.pool(net.leaky(a))) + net.two(net.drop(b)),
        16,
    ),
    "averaged": (lambda net, a, b: net.one(a.mean((2, 3), keepdim=True)) + net.two(b), 16),
}
FIXED = {  # and here something holds them
    "a sigmoid": (lambda net, a, b: net.one(a.sigmoid()) + net.two(b), 8),
    "a ReLU6": (lambda net, a, b: net.one(F.relu6(a)) + net.two(b), 8),
    "a constant": (lambda net, a, b: net.one(a + net.two.bias.sum()) + net.two(b), 8),
    "a number": (lambda net, a, b: net.one(a + 1) + net.two(b), 8),
    "a product": (lambda net, a, b: net.one(a * a) + net.two(b), 8),
    "a sum over space": (
        lambda net, a, b: net.one(a + a.mean((2, 3), keepdim=True)) + net.two(b),
        8,
    ),
    "a mean of channels": (lambda net, a, b: net.one(a - a.mean(1, keepdim=True)) + net.two(b), 8),
    "images side by side": (lambda net, a, b: net.one(torch.cat((a, b), 2)), 0),
    "padding that is no zero": (
        lambda net, a, b: net.one(F.pad(a, (1, 1), "constant", 1.0)) + net.two(F.pad(b, (1, 1))),
        8,
    ),
    "a change in place": (
        lambda net, a, b: net.one(a) + net.two(a.mul_(0.5).add_(1)) + net.two.bias.sum(),
        0,
    ),
    "itself, put out": (lambda net, a, b: net.one(a) + b[:, :6], 8),
    "what was added to the image": (
        lambda net, a, b: net.one(torch.cat((a[:, :5], a[:, 5:] + net.image), 1)) + net.two(b),
        13,
    ),
    "two readings by one layer": (lambda net, a, b: net.one(a) + net.one(b), 0),
    "a BatchNorm of both": (
        lambda net, a, b: net.one(net.again(a)) + net.one.bias.sum() + net.two(net.again(b)),
        0,
    ),
    "a BatchNorm without parameters": (lambda net, a, b: net.one(net.bare(a)) + net.two(b), 8),
    "images side by side, and one alone": (
        lambda net, a, b: net.one(torch.cat((a, b), 2)) + net.two(torch.cat((a, a), 2)),
        0,
    ),
    "one put out itself": (lambda net, a, b: (net.one(a) + net.two(b), {"a": [a]}), 8),
    "a mean of channels that is as long": (
        lambda net, a, b: net.one(a.mean(1)[..., None]) + net.two(b),
        8,
    ),
    "what does not take zeros": (
        lambda net, a, b: net.one(a @ net.turned.inverse()) + net.two(b),
        0,
    ),
    "a change in place before": (_changed, 8),
}


def _net(way):
    net = Net(
        way,
        pool=nn.MaxPool2d(3, 1, 1),
        leaky=nn.LeakyReLU(0.1),
        drop=nn.Sequential(nn.Dropout2d(), nn.Identity(), nn.AvgPool2d(3, 1, 1)),
        again=nn.BatchNorm2d(8),
        bare=nn.BatchNorm2d(8, affine=False),
    )
    net.turned = nn.Parameter(torch.eye(8).flip(0))
    net.register_buffer("image", torch.ones(1, 3, 8, 8))
    return net


def _student(net, **options):
    student = prepare(net.eval(), "w8a8", data=DATA, **options)
    for module in student.modules():
        if isinstance(module, Quantizer):
            module.bypass = True
    return student


@pytest.mark.parametrize(("way", "free"), [*FREE.values(), *FIXED.values()], ids=[*FREE, *FIXED])
def test_what_is_free_may_be_scaled_and_the_network_computes_what_it_did(way, free):
    student = _student(_net(way))
    channels = find_channels(student, IMAGES[:2])
    assert channels.total == free + 1
    with torch.no_grad():
        before = student(IMAGES)
        sizes = torch.empty(channels.total).uniform_(0.1, 10)
        sizes[0] = 1
        channels.scale(sizes)
        after = student(IMAGES)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    used = torch.cat([names for _, names in channels.norms] or [torch.zeros(1)]).unique()
    assert len(used[used > 0]) == free


@pytest.mark.parametrize(("relu", "free"), [(nn.ReLU(), 8), (nn.ReLU6(), 0)])
def test_a_quantized_relu_is_homogeneous_if_it_has_no_end(relu, free):
    torch.manual_seed(3)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), relu, nn.Conv2d(8, 4, 3), nn.Flatten()
    student = _student(nn.Sequential(*layers, nn.Linear(64, 5)), protocol="gdfq")
    assert find_channels(student, IMAGES[:2]).total == free + 1


def test_a_model_whose_graph_cannot_be_told_has_no_free_channels():
    net = _net(lambda net, a, b: net.one(a) if a.sum() > 0 else net.two(b))
    assert find_channels(_student(net), IMAGES[:2]).readers == []

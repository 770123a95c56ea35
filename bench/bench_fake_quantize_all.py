"""fake_quantize_all on the weights of a network against a call of fake_quantize for each.

ResNet-20; on a GPU also ResNet-50, whose weights are 102 MB.
"""

from functools import partial

import pytest
import torch

from bench.harness import Baseline, Case, choose
from bench.settings import DEVICE
from dfq_kernels import fake_quantize, fake_quantize_all
from dfq_kernels.fake_quantize_all import fake_quantize_all_reference

BOTH = ("fake_quantize_all", "fake_quantize_all_backward")


def resnet20():
    """Shapes of the weights."""
    wide = [(width, width, 3, 3) for width in (32, 64) for _ in range(5)]
    return [(16, 3, 3, 3), *[(16, 16, 3, 3)] * 6, (32, 16, 3, 3), (64, 32, 3, 3), *wide, (10, 64)]


def resnet50():
    shapes, inputs = [(64, 3, 7, 7)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        shapes.append((4 * width, inputs, 1, 1))
        for _ in range(blocks):
            shapes += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            inputs = 4 * width
    return [*shapes, (1000, inputs)]


NETWORKS = {"ResNet-20": resnet20, "ResNet-50": resnet50}
networks = pytest.mark.parametrize(
    "network", choose(tiny="ResNet-20", usual="ResNet-20", large="ResNet-50")
)


def weights(network):
    """xs, scales, zero_points, quant_mins, quant_maxs; 4 bits."""
    xs = [torch.randn(shape, device=DEVICE) for shape in NETWORKS[network]()]
    scales = [torch.rand(len(x), device=DEVICE) * 0.1 + 0.05 for x in xs]
    zero_points = [torch.zeros(len(x), device=DEVICE) for x in xs]
    return xs, scales, zero_points, [-8] * len(xs), [7] * len(xs)


def one_by_one(*lists):
    return [fake_quantize(*args, axis=0) for args in zip(*lists, strict=True)]


def composite(*lists):
    return [composite_of_one(*args) for args in zip(*lists, strict=True)]


def composite_of_one(x, scale, zero_point, quant_min, quant_max):
    scale, zero_point = (t.view(-1, *[1] * (x.ndim - 1)) for t in (scale, zero_point))
    ratio = x * (1 / scale)
    code = ratio + (ratio.round() - ratio).detach() + zero_point
    return (code.clamp(quant_min, quant_max) - zero_point) * scale


def check(lists):
    expected = fake_quantize_all_reference(*lists)
    torch.testing.assert_close(fake_quantize_all(*lists), expected, rtol=0, atol=0)


def case(network, lists, wrap, **fields):
    """``wrap`` makes a run of a function of the lists."""
    return Case(
        op="fake_quantize_all",
        size=f"weights of {network}, fp32",
        run=wrap(fake_quantize_all),
        check=partial(check, lists),
        baselines={
            "one by one": Baseline(wrap(one_by_one), 1, 1),
            "eager composite": Baseline(wrap(composite)),
        },
        elements=sum(x.numel() for x in lists[0]),
        **fields,
    )


def size_of(lists):
    return sum(x.nbytes for x in lists[0])


@networks
def test_forward(measure, network):
    lists = weights(network)
    moved = 2 * size_of(lists)
    measure(case(network, lists, lambda f: partial(f, *lists), name="forward", bytes=moved))


@networks
def test_forward_and_backward(measure, network):
    lists = weights(network)
    inputs = [tensor.requires_grad_() for tensor in (*lists[0], *lists[1])]
    grads = [torch.randn_like(x) for x in lists[0]]

    def both(function):
        return torch.autograd.grad(function(*lists), inputs, grads)

    name, moved = "forward + backward through autograd", 5 * size_of(lists)
    measure(case(network, lists, partial(partial, both), name=name, bytes=moved, ops=BOTH))

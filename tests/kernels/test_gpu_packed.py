"""A packed network on a GPU: the integers of the CPU, without waiting, in a CUDA graph."""

import pytest
import torch
from on_gpu import CUDA, DEVICE, DRY_RUN, MARKS, backends, use

from dfq.deploy import freeze
from dfq.deploy.measure import captured
from tests.deploy.test_freeze import IMAGE, assert_near, images, student_of

pytestmark = MARKS
OPS = ("quantize", "requantize", "qconv2d", "qlinear")
NETS = ["plain"] if DRY_RUN else ["plain", "residual", "depthwise", "branches"]
X = images()[:2] if DRY_RUN else images()

nets = pytest.mark.parametrize("name", NETS)


@backends
@nets
def test_it_computes_what_it_does_on_the_cpu(name, backend):
    packed = freeze(student_of(name), IMAGE)
    expected = packed(X)
    with use(backend, *OPS):
        found = packed.to(DEVICE)(X.to(DEVICE)).cpu()
        assert_near(lambda _: found, lambda _: expected, X)
        assert packed.to("cpu")(X).device == X.device


@backends
@nets
def test_it_never_waits(name, backend):
    packed, x = freeze(student_of(name), IMAGE).to(DEVICE), X.to(DEVICE)
    with use(backend, *OPS):
        packed(x)
        if not CUDA:
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            packed(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@backends
@nets
def test_in_a_cuda_graph(name, backend):
    packed, x = freeze(student_of(name), IMAGE).to(DEVICE), X.to(DEVICE)
    with use(backend, *OPS):
        expected = packed(x.flip(0))
        if not CUDA:
            return
        found = []
        replay = captured(lambda: found.append(packed(x)))
        x.copy_(x.flip(0))
        replay()
        assert torch.equal(found[-1], expected)

"""A training step of the main job: a W4A4 student of ResNet-20 on 128 images, as a method does it.

The baselines are the same step with quantizers and BatchNorm made of PyTorch's ops, one after the
other, in its default layout; and the step of a network without either, which tells how much of the
time they still take.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from bench.harness import Baseline, Case
from bench.settings import DEVICE, TINY
from dfq.descent import descend
from dfq.distill.losses import kd_divergence
from dfq.distill.student import StudentConfig, student_optimizer
from dfq.models.cifar import CifarResNet
from dfq.prepare import calibrate, prepare, split_parameters
from dfq.prepare.frozen import Frozen
from dfq.prepare.quantizer import Quantizer
from dfq.types import DataSpec
from dfq_kernels import _backend

BATCH = 2 if TINY else 128
TEMPERATURE = 4.0  # of the distilling methods
DATA = DataSpec(
    shape=(3, 8, 8) if TINY else (3, 32, 32), classes=10, mean=(0.5,) * 3, std=(0.25,) * 3
)
OPS = tuple(
    op + end
    for op in ("fake_quantize", "fake_quantize_all", "batch_norm")
    for end in ("", "_backward")
)


@pytest.fixture
def student():
    teacher = CifarResNet(8 if TINY else 20).eval().requires_grad_(False)
    student = prepare(teacher.to(DEVICE, memory_format=torch.channels_last), "w4a4", data=DATA)
    calibrate(student, torch.randn(BATCH, *DATA.shape, device=DEVICE))
    return student


def of_separate_ops(student):
    """The same student without what dfq_kernels makes possible."""
    plain = copy.deepcopy(student).to(memory_format=torch.contiguous_format)
    plain._forward_pre_hooks.clear()  # which put all weights on their grids at once
    for module in plain.modules():
        if isinstance(module, Frozen):
            module.rectifies = False
    return plain


def of_convolutions(student):
    """The same student without quantizers and BatchNorm."""
    bare = copy.deepcopy(student)
    for module in list(bare.modules()):
        if isinstance(module, Quantizer):
            module.bypass = True
        for name, child in module.named_children():
            if isinstance(child, Frozen):
                setattr(module, name, nn.Identity())
    return bare


def step_of(student, images, logits):
    """A run of one step."""
    optimizer = student_optimizer(*split_parameters(student), StudentConfig())

    def step():
        loss = kd_divergence(student(images), logits, TEMPERATURE).mean()
        descend(loss, optimizer)
        return loss

    return step


def by_reference(run):
    with _backend.use("reference"):
        return run()


def check(student, images, logits):
    """The gate: the same loss and the same gradients, but for rounding."""
    ours, others = copy.deepcopy(student), of_separate_ops(student)
    loss = step_of(ours, images, logits)()
    expected_loss = by_reference(step_of(others, images, logits))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=1e-3)
    grads, expected = (
        torch.cat([p.grad.flatten() for p in s.parameters() if p.grad is not None])
        for s in (ours, others)
    )
    error = ((grads - expected).norm() / expected.norm()).item()
    # a rounding error that moves an activation to the next code moves what follows too
    assert error < 0.05, f"the gradients are {error:.1%} off"


def test_step(measure, student):
    images = torch.randn(BATCH, *DATA.shape, device=DEVICE)
    logits = torch.randn(BATCH, DATA.classes, device=DEVICE)
    step, separate, bare = (
        step_of(make(student), images, logits)
        for make in (copy.deepcopy, of_separate_ops, of_convolutions)
    )
    measure(
        Case(
            op="training_step",
            name="W4A4 student of ResNet-20",
            size=f"{BATCH} images",
            run=step,
            check=partial(check, student, images, logits),
            baselines={
                "separate PyTorch ops": Baseline(partial(by_reference, separate)),
                "no quantization, no BatchNorm": Baseline(bare),
            },
            elements=BATCH,
            ops=OPS,
        )
    )

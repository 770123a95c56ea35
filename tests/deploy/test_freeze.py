"""A frozen student gives what the student gave, and holds integers only."""

import pytest
import torch
from torch import nn

from dfq.deploy import freeze
from dfq.prepare import calibrate, prepare
from dfq.types import InputError, QuantSpec
from tests.deploy.nets import NETS, build
from tests.prepare.test_fusion import Untraceable

IMAGE = (3, 8, 8)


def student_of(name, bits="w4a4", **options):
    student = prepare(build(name), bits, **options)
    calibrate(student, images())
    return student.eval()


def images():
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def assert_near(packed, student, x):
    """Equal but for float rounding, which may turn single integers by one."""
    with torch.no_grad():
        expected = student(x)
    found = packed(x)
    off = (found - expected).abs() > 1e-5 * expected.abs().max()
    assert off.any(1).float().mean() <= 0.1, f"{off.any(1).sum()} of {len(x)} images differ"
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2 * expected.abs().max().item())


@pytest.mark.parametrize("bits", ["w4a4", "w8a8", "w2a2", "w3a5"])
@pytest.mark.parametrize("name", NETS)
def test_a_frozen_student_computes_what_the_student_does(name, bits):
    student = student_of(name, bits)
    assert_near(freeze(student, IMAGE), student, images())


@pytest.mark.parametrize("name", ["plain", "depthwise"])
def test_asymmetric_weights(name):
    student = student_of(name, scales="minmax")
    assert_near(freeze(student, IMAGE), student, images())


@pytest.mark.parametrize("name", ["depthwise", "plain"])
def test_protocol_gdfq_with_its_float_input(name):
    student = student_of(name, protocol="gdfq")
    packed = freeze(student, IMAGE)
    assert [step.op for step in packed.program.steps][:1] != ["quantize"]
    assert_near(packed, student, images())


def _steps(packed):
    return [step.op for step in packed.program.steps]


def test_integers_run_through_a_residual_network():
    """One step a layer: BatchNorm, ReLU and addition are part of it, and nothing is float between.

    The pooled stem has 8 bits, for the block's first layer and for its addition alike. Sums are
    kept in 8 bits and read in 4.
    """
    steps = _steps(freeze(student_of("residual"), IMAGE))
    assert steps[:8] == [
        "quantize",
        "conv",
        "max_pool",
        "conv",
        "conv",
        "requantize",
        "conv",
        "conv",
    ]
    assert steps[-4:] == ["mean", "quantize", "linear", "call"]


def test_a_chain_without_branches_is_layers_alone():
    steps = _steps(freeze(student_of("plain"), IMAGE))
    assert steps == ["call", "quantize", "conv", "max_pool", "conv", "call", "linear", "linear"]


def test_branches_are_joined_as_integers():
    """Those that one layer alone reads are written on its grid; the pooled one is rounded to it."""
    program = freeze(student_of("branches"), IMAGE).program
    writers = {step.output: step for step in program.steps}
    join = next(step for step in program.steps if step.numbers.get("function") == "cat")
    assert [writers[name].op for name in join.inputs] == ["conv", "conv", "quantize"]
    reader = next(step for step in program.steps if join.output in step.inputs)
    assert reader.op == "conv"
    grids = [writers[name].numbers["grid"] for name in join.inputs]
    assert grids[0] == grids[1] == grids[2]


def test_it_holds_no_float_weights():
    student = student_of("depthwise")
    packed = freeze(student, IMAGE)
    largest = max(b.numel() for b in packed.buffers() if b.is_floating_point())
    assert largest <= 24  # one value a channel
    assert not list(packed.parameters())
    stored = sum(b.numel() * b.element_size() for b in packed.buffers())
    assert stored < sum(p.numel() * 4 for p in student.parameters())


def test_four_bit_weights_take_half_a_byte():
    student = prepare(nn.Sequential(nn.Conv2d(64, 16, 3), nn.Conv2d(16, 5, 2)).eval(), "w8a8")
    calibrate(student, torch.randn(4, 64, 4, 4))
    sizes = []
    for bits in (8, 4):
        student[0].weight_quantizer.spec = QuantSpec(bits, axis=0)
        packed = freeze(student, IMAGE)
        sizes.append(packed.tensors()[packed.program.steps[1].tensors["weight"]].numel())
    assert sizes == [16 * 64 * 9, 16 * 64 * 9 // 2]


def test_the_student_is_left_alone():
    student = student_of("residual")
    before = {name: value.clone() for name, value in student.state_dict().items()}
    freeze(student, IMAGE)(images())
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_any_batch_size():
    packed = freeze(student_of("residual"), IMAGE)
    whole = packed(images())
    assert torch.equal(torch.cat([packed(part) for part in images().split(7)]), whole)
    assert packed(images()[:0]).shape == (0, 5)


def test_what_cannot_be_stored_as_data_is_refused_by_name():
    student = prepare(Untraceable().eval(), "w4a4")
    calibrate(student, torch.randn(4, 8, 8, 8))
    with pytest.raises(InputError, match="Untraceable cannot be traced"):
        freeze(student, IMAGE)

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return torch.sort(self.norm(self.conv(x)).mean((2, 3)), 1)[0]

    student = prepare(Sorted().eval(), "w4a4")
    calibrate(student, images())
    with pytest.raises(InputError, match="sort"):
        freeze(student, IMAGE)


def test_a_student_without_scales_is_refused():
    with pytest.raises(InputError, match="calibrate"):
        freeze(prepare(build("plain"), "w4a4"), IMAGE)

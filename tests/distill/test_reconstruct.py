"""Reconstruction without quantizers: units of float networks, with knobs made here."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from dfq.distill.blocks import find_units
from dfq.distill.losses import reconstruction_error
from dfq.distill.reconstruct import (
    Knobs,
    ReconstructionConfig,
    Unit,
    mixed,
    reconstruct,
    reconstruction_units,
)
from dfq.types import InputError
from tests.distill.test_blocks import CASES

QUICK = ReconstructionConfig(steps=40, batch_size=8, lr=0.05, weight_scale_lr=0.05, drop=0.0)
NAMES = ["cifar", "bottleneck", "inverted residual", "tapped"]


def _pair(name):
    """A teacher and a student that differs in every weight."""
    torch.manual_seed(6)
    teacher = CASES[name][0].eval().requires_grad_(False)
    student = copy.deepcopy(teacher)
    for parameter in student.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return teacher, student


def _layers(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def _units(teacher, student, images, traced=True):
    layers = _layers(teacher)
    plan = find_units(fx.symbolic_trace(teacher).graph, teacher, layers) if traced else None
    return reconstruction_units(teacher, student, plan, layers, images, batch_size=5)


def _first_inputs(model, layers, images):
    """What reaches each layer first, by running the whole model."""
    seen = {}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(
            lambda module, args, n=n: seen.setdefault(n, args[0].clone())
        )
        for n in layers
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_cached_inputs_are_those_of_running_everything_again(name, traced):
    teacher, student = _pair(name)
    images = torch.randn(12, 3, 16, 16)
    floats = _first_inputs(teacher, _layers(teacher), images)
    count = 0
    for unit in _units(teacher, student, images, traced):
        first = unit.layers[0]
        now = _first_inputs(student, [first], images)
        torch.testing.assert_close(unit.inputs, now[first])
        torch.testing.assert_close(unit.float_inputs, floats[first])
        # as if it had learned: what comes next must see it
        for layer in unit.layers:
            student.get_submodule(layer).weight *= 1.1
        count += len(unit.layers)
    assert count == len(_layers(teacher))


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_what_the_teacher_makes_of_its_own_inputs(name):
    teacher, _ = _pair(name)
    images = torch.randn(12, 3, 16, 16)
    *_, last = _units(teacher, copy.deepcopy(teacher), images)
    assert torch.equal(last.targets, torch.cat([teacher(part) for part in images.split(5)]))
    for unit in _units(teacher, copy.deepcopy(teacher), images):
        torch.testing.assert_close(unit.student(unit.inputs), unit.targets)


def test_without_a_plan_layers_learn_one_by_one_and_a_warning_says_so(caplog):
    teacher, student = _pair("bottleneck")
    images = torch.randn(6, 3, 16, 16)
    with caplog.at_level(logging.WARNING, "dfq"):
        units = list(_units(teacher, student, images, traced=False))
    assert "one by one" in caplog.text
    assert sorted(unit.layers for unit in units) == sorted((name,) for name in _layers(teacher))
    assert [unit.layers[0] for unit in units][:2] == ["stem.0", "body.0.conv1"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def _unit():
    """[16, 3, 4, 4] through a 1x1 convolution that is to become another."""
    torch.manual_seed(7)
    student, teacher = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1).requires_grad_(False)
    inputs = torch.randn(16, 3, 4, 4)
    return Unit(("0",), student, inputs, inputs, teacher(inputs))


def _knobs(unit, penalty=None, redraw=lambda: None):
    penalty = penalty or (lambda beta: torch.zeros(()))
    return Knobs([unit.student.weight], [unit.student.bias], [], penalty, redraw)


def _learn(unit, knobs, config=QUICK, seed=0):
    lines = []
    rng = torch.Generator().manual_seed(seed)
    reconstruct(
        unit, knobs, config, rng=rng, report=lambda step, **v: lines.append((step, v["error"]))
    )
    return lines


def test_it_lowers_the_error_and_tells_every_step():
    unit = _unit()
    lines = _learn(unit, _knobs(unit))
    assert [step for step, _ in lines] == list(range(1, 41))
    assert lines[-1][1] < 0.1 * lines[0][1]


def test_the_pull_starts_after_the_warm_up_and_its_exponent_falls():
    unit, seen = _unit(), []

    def penalty(beta):
        seen.append(beta)
        return 1e6 * unit.student.weight.square().sum()

    config = replace(QUICK, warmup=0.25, weight_scale_lr=0.0)
    lines = _learn(unit, _knobs(unit, penalty), config)
    assert seen[:11] == [20.0] * 11
    assert seen[25] == pytest.approx(20 - 18 * (25 / 40 - 0.25) / 0.75)
    assert seen[-1] == pytest.approx(20 - 18 * (39 / 40 - 0.25) / 0.75)
    assert lines[10][1] < lines[0][1]  # until here the error alone decides
    assert unit.student.weight.detach().abs().max() < 0.1


def _pulled(relative, scale):
    """The weight after steps whose pull, towards zero, competes with errors of a given size."""
    unit = _unit()
    weight = unit.student.weight.detach().clone().requires_grad_()
    bias = unit.student.bias.detach().clone()
    convolve = torch.nn.functional.conv2d
    student = nn.Module()
    student.forward = lambda x: scale * convolve(x, weight, bias)
    unit = unit._replace(student=student, targets=scale * unit.targets)
    knobs = Knobs([weight], [], [], lambda beta: weight.square().sum(), lambda: None)
    config = replace(QUICK, rounding_weight=1.0, relative=relative)
    _learn(unit, knobs, config)
    return weight.detach()


def test_the_relative_pull_weighs_the_same_for_small_and_large_errors():
    torch.testing.assert_close(_pulled(True, 1.0), _pulled(True, 1e-2), rtol=1e-3, atol=1e-3)
    gap = (_pulled(False, 1.0) - _pulled(False, 1e-2)).abs().max()
    assert gap > 0.05


def test_each_part_has_its_own_rate():
    for config, moved in ((replace(QUICK, lr=0.0), "bias"), (QUICK, "weight")):
        unit = _unit()
        before = {n: p.detach().clone() for n, p in unit.student.named_parameters()}
        _learn(unit, _knobs(unit), replace(config, weight_scale_lr=0.05 if moved == "bias" else 0))
        for name, parameter in unit.student.named_parameters():
            assert torch.equal(parameter, before[name]) == (name != moved)


def test_the_rates_of_scales_fall_to_nothing_and_that_of_the_rounding_does_not():
    unit, steps = _unit(), []

    def penalty(beta):  # so steep that Adam's steps are its rates
        steps.append([p.detach().flatten()[0].item() for p in unit.student.parameters()])
        return -1e6 * sum(p.sum() for p in unit.student.parameters())

    _learn(unit, _knobs(unit, penalty), replace(QUICK, warmup=0.0, relative=False))
    weight, bias = torch.tensor(steps).diff(dim=0).T
    torch.testing.assert_close(weight, torch.full((39,), 0.05), rtol=1e-3, atol=0)
    fractions = torch.arange(39) / 40
    torch.testing.assert_close(
        bias, 0.025 * (1 + (torch.pi * fractions).cos()), rtol=1e-2, atol=1e-4
    )


def test_inputs_are_mixed_and_drawn_anew_every_step():
    unit = _unit()
    other = unit._replace(float_inputs=unit.inputs + 100.0)
    means, draws = [], []
    student = unit.student.forward
    unit.student.forward = lambda x: means.append(float(x.mean())) or student(x)
    _learn(other, _knobs(unit, redraw=lambda: draws.append(1)), replace(QUICK, drop=0.25))
    assert len(draws) == QUICK.steps
    assert sum(means) / len(means) == pytest.approx(25, abs=2)
    assert len(set(means)) == len(means)


def test_same_seed_same_result():
    first, second, other = _unit(), _unit(), _unit()
    for unit, seed in ((first, 0), (second, 0), (other, 1)):
        _learn(unit, _knobs(unit), seed=seed)
    assert torch.equal(first.student.weight, second.student.weight)
    assert not torch.equal(first.student.weight, other.student.weight)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_mixed_takes_each_element_from_one_or_the_other(share):
    inputs, others = torch.randn(2, 3, 20, 20), torch.randn(2, 3, 20, 20)
    result = mixed(inputs, others, share, torch.tensor([3]))
    from_others = (result - others).abs() < (result - inputs).abs()
    torch.testing.assert_close(result, torch.where(from_others, others, inputs))
    assert float(from_others.float().mean()) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 5)])
def test_reconstruction_error_by_hand(shape):
    """A difference of 2 in three channels: 12 at every position."""
    target = torch.randn(shape)
    error = reconstruction_error(target + 2, target)
    torch.testing.assert_close(error, torch.full((2,), 12.0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"drop": 1.5}, "drop must be 0 to 1, got 1.5"),
        ({"warmup": 1.0}, "warmup must be at least 0 and below 1, got 1.0"),
    ],
)
def test_shares_beyond_one_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        replace(QUICK, **change)


@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_no_steps_and_steps_without_images_are_refused(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        replace(QUICK, **{name: 0})

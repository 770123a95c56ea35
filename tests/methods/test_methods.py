from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn

from dfq.distill.losses import kd_divergence
from dfq.distill.student import StudentConfig
from dfq.distill.weighting import Objective
from dfq.methods import METHODS, DMKDConfig
from dfq.methods.dmkd import DMKD_BASELINES
from dfq.prepare import calibrate, prepare
from dfq.synthesize.generate import GeneratorConfig
from dfq.synthesize.pool import Schedule
from dfq.types import DataSpec, Images, InputError

DISTILLING = ["ddaq", "dmkd", "gdfq"]  # by the same generator and schedule
DATA = DataSpec(shape=(3, 8, 8), classes=4, mean=(0.5,) * 3, std=(0.25,) * 3)
TINY = {
    "generator": GeneratorConfig(batch_size=16, steps_per_batch=3, first_steps=2, latent_dim=8),
    "student": StudentConfig(lr=1e-3),
    "schedule": Schedule(
        batches=3, warmup_batches=2, pool_batches=2, steps_per_batch=4, batch_size=8
    ),
}


def _teacher():
    torch.manual_seed(1)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    body += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model[-1].weight.data *= 30  # logits far enough apart that low bits hurt
    return model.eval().requires_grad_(False)


def _train(name, seed=0, given=None, config=None, rng=None, **changes):
    method = METHODS[name]
    teacher = _teacher()
    student = prepare(teacher, "w3a3", data=DATA)
    config = replace(config or method.efforts["default"], **{**TINY, **changes})
    lines = []
    rng = rng or torch.Generator().manual_seed(seed)
    options = {"rng": rng, "given": given}
    options["report"] = lambda stage, step, steps, **v: lines.append((stage, step, steps, v))
    student, images = method.run(teacher, student, DATA, config, **options)
    return teacher, student, images, lines


def _same(first, second):
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


@pytest.mark.parametrize("name", DISTILLING)
def test_trains_the_student_and_leaves_the_teacher_alone(name):
    teacher, student, _, _ = _train(name)
    assert _same(teacher, _teacher())
    assert not torch.equal(student[3].weight, teacher[3].weight)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert torch.equal(student[1].running_mean, teacher[1].running_mean)
    assert torch.equal(student[1].running_var, teacher[1].running_var)


@pytest.mark.parametrize("name", DISTILLING)
def test_same_seed_gives_the_same_student_and_another_seed_another(name):
    first, second, other = _train(name), _train(name), _train(name, seed=1)
    assert _same(first[1], second[1])
    assert torch.equal(first[2].images, second[2].images)
    assert not _same(first[1], other[1])


@pytest.mark.parametrize("name", DISTILLING)
def test_the_student_begins_after_the_warm_up_and_counts_its_steps(name):
    *_, lines = _train(name)
    stages = [stage for stage, *_ in lines]
    assert stages == ["synthesize"] * 8 + ["distill"] * 4 + ["synthesize"] * 3 + ["distill"] * 4
    distill = [(step, steps) for stage, step, steps, _ in lines if stage == "distill"]
    assert distill == [(step, 8) for step in range(1, 9)]


@pytest.mark.parametrize("name", DISTILLING)
def test_the_pool_holds_the_latest_batches(name):
    *_, images, _ = _train(name)
    assert images.images.shape == (32, 3, 8, 8)
    assert images.labels.shape == (32,)


@pytest.mark.parametrize("name", DISTILLING)
def test_given_images_take_the_place_of_the_generator(name):
    given = Images(torch.randn(32, 3, 8, 8), torch.arange(32) % 4)
    _, student, images, lines = _train(name, given=given)
    assert {stage for stage, *_ in lines} == {"distill"}
    assert torch.equal(images.images, given.images)
    assert not _same(student, _train(name)[1])


@pytest.mark.parametrize("effort", ["quick", "default", "full", "paper"])
@pytest.mark.parametrize("name", DISTILLING)
def test_every_effort_runs(name, effort):
    config = METHODS[name].efforts[effort]
    short = {
        "generator": replace(config.generator, batch_size=8, steps_per_batch=1, first_steps=1),
        "schedule": replace(
            config.schedule,
            batches=2,
            warmup_batches=1,
            pool_batches=1,
            steps_per_batch=1,
            batch_size=4,
        ),
    }
    student, _ = METHODS[name].run(
        _teacher(),
        prepare(_teacher(), "w4a4", data=DATA),
        DATA,
        replace(config, **short),
        rng=torch.Generator().manual_seed(0),
    )
    assert all(p.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("name", DISTILLING)
def test_learning_brings_the_student_nearer_to_its_teacher(name):
    schedule = replace(TINY["schedule"], batches=2, steps_per_batch=150, batch_size=16)
    teacher, student, images, _ = _train(name, student=StudentConfig(lr=2e-3), schedule=schedule)
    untrained = prepare(teacher, "w3a3", data=DATA)
    calibrate(untrained, images.images)
    with torch.no_grad():
        wanted = teacher(images.images)
        before, after = (
            kd_divergence(model(images.images), wanted, 4.0).mean()
            for model in (untrained, student)
        )
    assert after < 0.75 * before


def test_dmkd_weights_change_the_student():
    static = _train("dmkd", weight_lr=0.0)[1]
    assert not _same(static, _train("dmkd")[1])


def _baseline(name, **options):
    """What was reported of each step of a student that one of the baselines taught."""
    *_, lines = _train("dmkd", config=DMKD_BASELINES[name], **options)
    return [values for stage, *_, values in lines if stage == "distill"]


def _of_teachers(values, name):
    columns = [key for key in values if key.startswith(f"{name}_") and key[-1].isdigit()]
    return torch.stack([values[key] for key in columns])


def test_dmkd_of_the_float_teacher_alone_is_gdfq():
    rng = torch.Generator().manual_seed(0)
    torch.randint(2**62, (), generator=rng)  # dmkd's one draw for its weighing
    _, alone, images, _ = _train("dmkd", config=DMKD_BASELINES["float"])
    _, gdfq, its_images, _ = _train("gdfq", rng=rng)
    assert torch.equal(images.images, its_images.images)
    assert _same(alone, gdfq)


@pytest.mark.parametrize(
    ("name", "weights"),
    [("uniform", [1 / 3] * 3), ("static", [1 / 2, 1 / 3, 1 / 6]), ("high-bit", [1 / 2] * 2)],
)
def test_dmkd_fixed_weights_stay_what_they_are(name, weights):
    for values in _baseline(name):
        torch.testing.assert_close(_of_teachers(values, "weight"), torch.tensor(weights))


def test_dmkd_high_bit_leaves_out_the_float_teacher():
    every, quantized = (_of_teachers(_baseline(n)[0], "kd") for n in ("uniform", "high-bit"))
    assert torch.equal(quantized, every[1:])


def test_dmkd_random_weights_are_drawn_in_every_step():
    schedule = replace(TINY["schedule"], steps_per_batch=100)
    steps = _baseline("random", schedule=schedule)
    weights = torch.stack([_of_teachers(values, "weight") for values in steps])  # [200, 3]
    assert len(weights.unique(dim=0)) == 200
    # means over 8 images of a Dirichlet(1, 1, 1), whose variance is 1/18
    torch.testing.assert_close(weights.mean(0), torch.full((3,), 1 / 3), atol=0.03, rtol=0)
    torch.testing.assert_close(weights.var(0), torch.full((3,), 1 / 144), atol=2e-3, rtol=0)


@pytest.mark.parametrize("config", [*DMKD_BASELINES.values(), DMKDConfig(objective="meta")])
def test_dmkd_lessons_are_the_same_whoever_weighs(config):
    """All draws of images are of ``rng``: where its state is the same in the end, so were they."""
    rng, usual = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    _train("dmkd", config=config, rng=rng)
    _train("dmkd", rng=usual)
    assert torch.equal(rng.get_state(), usual.get_state())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"float_teacher": False, "teacher_bits": ()}, "nobody teaches"),
        ({"static_weights": (1.0, 1.0)}, "must be 3 numbers, one a teacher"),
        ({"static_weights": (1.0, 1.0, 0.0)}, "static_weights must be above 0"),
        ({"weight_input": "static"}, "static weights learn nothing"),
        ({"weight_input": "random", "objective": "entropy"}, "random weights learn nothing"),
    ],
)
def test_dmkd_refuses_weights_that_fit_nothing(changes, message):
    with pytest.raises(InputError, match=message):
        DMKDConfig(**changes)


@pytest.mark.parametrize("weight_input", ["image", "logits", "bank"])
@pytest.mark.parametrize("objective", get_args(Objective))
def test_dmkd_learns_its_weights_whatever_it_looks_at(weight_input, objective):
    """The scores start at zero; a weight net without a gradient would leave them there."""
    changes = {"weight_input": weight_input, "objective": objective, "weight_lr": 0.02}
    *_, lines = _train("dmkd", entropy_weight=1.0, **changes)
    weights = _of_teachers(lines[-1][-1], "weight")
    assert (weights - 1 / 3).abs().max() > 1e-6  # rounding: 3e-8
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


def test_dmkd_meta_gives_weight_to_the_teacher_whose_steps_help():
    """A 2-bit copy leads away from the float model, whose logits are asked for."""
    schedule = replace(TINY["schedule"], steps_per_batch=100)
    changes = {"weight_input": "bank", "objective": "meta", "weight_lr": 0.05}
    *_, lines = _train("dmkd", teacher_bits=(2,), schedule=schedule, **changes)
    assert float(lines[-1][-1]["weight_0"]) > 0.8


def test_dmkd_quantized_teachers_change_the_student():
    assert not _same(_train("dmkd", teacher_bits=())[1], _train("dmkd")[1])


@pytest.mark.parametrize("weight_input", ["image", "logits", "bank"])
@pytest.mark.parametrize("objective", ["uncertainty", "entropy"])
def test_dmkd_keeps_every_teacher_in_play(weight_input, objective):
    """Check 8 of the weight-collapse monitor: entropy stays above 5 % of log(teachers)."""
    *_, lines = _train(
        "dmkd",
        weight_input=weight_input,
        objective=objective,
        entropy_weight=1.0,
        weight_lr=0.05,
        schedule=replace(TINY["schedule"], steps_per_batch=100),
    )
    last = lines[-1][-1]
    assert float(last["weight_entropy"]) > 0.05
    torch.testing.assert_close(sum(last[f"weight_{k}"] for k in range(3)), torch.tensor(1.0))


def test_dmkd_plain_softmax_shows_the_collapse():
    """The monitor can fail: R1's weights run to one teacher."""
    *_, lines = _train(
        "dmkd",
        weight_input="bank",
        objective="softmax",
        weight_lr=1.0,
        schedule=replace(TINY["schedule"], steps_per_batch=300),
    )
    assert float(lines[-1][-1]["weight_entropy"]) < 0.05

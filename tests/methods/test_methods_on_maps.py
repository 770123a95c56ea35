"""A model whose output is a set of maps learns without labels: ddaq and genie serve it."""

from dataclasses import replace

import pytest
import torch

from dfq.distill.losses import kd_divergence, output_divergence
from dfq.distill.student import StudentConfig
from dfq.methods import METHODS
from dfq.models import freeze
from dfq.outputs import map_distance
from dfq.pipeline import suggest_config
from dfq.prepare import calibrate, prepare
from dfq.prepare.sensitivity import layer_importance
from dfq.synthesize.pool import Schedule
from dfq.types import InputError
from tests.detector import DATA, detector

SCHEDULE = Schedule(batches=3, warmup_batches=1, pool_batches=3, steps_per_batch=4, batch_size=8)
SERVING = [name for name, method in METHODS.items() if method.maps]


def _ddaq(**changes):
    config = METHODS["ddaq"].maps["quick"]
    generator = replace(config.generator, steps_per_batch=3, first_steps=2, latent_dim=8)
    return replace(config, **{"generator": generator, "schedule": SCHEDULE, **changes})


def _genie(steps=6, **changes):
    config = METHODS["genie"].maps["quick"]
    latents = replace(config.latents, steps=4, first_steps=2, latent_dim=8, **changes)
    return replace(
        config, latents=latents, reconstruction=replace(config.reconstruction, steps=steps)
    )


def _train(name, config=None, seed=0, bits="w3a3"):
    teacher, lines = freeze(detector(), DATA), []
    student, images = METHODS[name].run(
        teacher,
        prepare(teacher, bits, data=DATA),
        DATA,
        config or {"ddaq": _ddaq, "genie": _genie}[name](),
        rng=torch.Generator().manual_seed(seed),
        report=lambda stage, step, steps, **v: lines.append((stage, step, steps, v)),
    )
    return teacher, student, images, lines


def _same(first, second):
    return all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def _distance(student, teacher, count=64):
    """On images that neither has seen."""
    fresh = torch.randn(count, *DATA.shape, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return map_distance(student(fresh), teacher(fresh)).mean()


@pytest.mark.parametrize("name", ["ddaq", "genie"])
def test_it_trains_the_student_and_leaves_the_teacher_alone(name):
    teacher, student, images, _ = _train(name)
    assert _same(teacher, freeze(detector(), DATA))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())
    assert not torch.equal(student.down[0].weight, teacher.down[0].weight)
    assert images.images.shape[1:] == DATA.shape
    assert images.labels.tolist() == [0] * len(images.images)


@pytest.mark.parametrize("name", ["ddaq", "genie"])
def test_same_seed_gives_the_same_student_and_another_seed_another(name):
    first, second, other = _train(name), _train(name), _train(name, seed=1)
    assert _same(first[1], second[1])
    assert torch.equal(first[2].images, second[2].images)
    assert not _same(first[1], other[1])


@pytest.mark.parametrize("name", ["ddaq", "genie"])
def test_it_comes_nearer_to_the_teacher_than_nearest_rounding(name):
    student = StudentConfig(lr=2e-3)
    schedule = replace(SCHEDULE, batches=2, steps_per_batch=100, batch_size=16)
    generator = replace(_ddaq().generator, steps_per_batch=30)
    ddaq = _ddaq(student=student, schedule=schedule, generator=generator)
    config = ddaq if name == "ddaq" else _genie(100)
    teacher, student, images, _ = _train(name, config, bits="w2a4")
    nearest = prepare(teacher, "w2a4", data=DATA)
    calibrate(nearest, images.images)
    assert _distance(student, teacher) < 0.85 * _distance(nearest, teacher)


def test_the_images_come_near_to_the_statistics():
    config = _ddaq(generator=replace(_ddaq().generator, steps_per_batch=60))
    *_, lines = _train("ddaq", config)
    losses = [float(v["bn_loss"]) for stage, *_, v in lines if stage == "synthesize"]
    assert losses[61] < 0.2 * losses[0]
    assert all("teacher_accuracy" not in values for *_, values in lines)


def test_the_second_discriminator_finds_where_the_maps_differ():
    """On its images a student that does not learn is further from the teacher."""
    still = StudentConfig(lr=0.0, scale_lr=0.0)
    generator = replace(_ddaq().generator, steps_per_batch=40)
    distances = []
    for weight in (0.0, 5.0):
        config = _ddaq(discrepancy_weight=weight, student=still, generator=generator)
        teacher, student, images, _ = _train("ddaq", config)
        latest = images.images[-16:]  # the warm-up's images know no student
        with torch.no_grad():
            distances.append(map_distance(student(latest), teacher(latest)).mean())
    assert distances[1] > 1.1 * distances[0]


def test_the_importance_changes_images_and_student():
    found = [
        _train("ddaq", _ddaq(importance=kind)) for kind in ("sensitivity", "hessian", "uniform")
    ]
    for i in range(3):
        for j in range(i):
            assert not _same(found[i][1], found[j][1])
            assert not torch.equal(found[i][2].images, found[j][2].images)


def test_the_layer_with_few_bits_matters_most():
    teacher = freeze(detector(), DATA)
    student = prepare(teacher, "w8a8", data=DATA, overrides={"head": 2})
    images = torch.randn(16, *DATA.shape)
    calibrate(student, images)
    rng = torch.Generator().manual_seed(0)
    found = layer_importance(teacher, student, images, "sensitivity", rng=rng)
    assert sum(found.values()) == pytest.approx(len(found))
    assert max(found, key=found.__getitem__) == "head.0"


def test_logits_are_compared_as_ever():
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    expected = kd_divergence(student, teacher, 4.0)
    assert torch.equal(output_divergence(student, teacher, 4.0), expected)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in SERVING])
def test_a_method_that_needs_classes_says_so(name):
    with pytest.raises(InputError, match=f"{name} needs classes.*choose from {', '.join(SERVING)}"):
        suggest_config(name, "quick", maps=True)


@pytest.mark.parametrize("name", SERVING)
def test_every_effort_of_a_serving_method_is_a_config_of_its_own(name):
    method = METHODS[name]
    assert {"quick", "default", "full"} <= set(method.maps)
    for effort, config in method.maps.items():
        assert type(config) is type(method.efforts["default"])
        assert suggest_config(name, effort, maps=True) == config

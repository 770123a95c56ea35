"""DDAQ's own ideas do something: the second discriminator, and the importance of layers."""

from dataclasses import replace

import pytest
import torch

from dfq.distill.features import feature_distance, relative_distance
from dfq.methods import METHODS
from dfq.prepare import prepare
from tests.methods.test_methods import DATA, TINY, _same, _teacher, _train

BEGUN = replace(TINY["schedule"], batches=4, warmup_batches=1, pool_batches=1)


def test_the_second_discriminator_changes_the_images():
    plain, adversarial, again = (
        _train("ddaq", discrepancy_weight=weight, schedule=BEGUN)[2].images
        for weight in (0.0, 5.0, 5.0)
    )
    assert torch.equal(adversarial, again)
    assert not torch.equal(plain, adversarial)


def test_the_second_discriminator_finds_where_the_models_differ():
    """On its images a student that does not learn is further from the teacher."""
    distances = []
    for weight in (0.0, 5.0):
        generator = replace(TINY["generator"], steps_per_batch=40)
        teacher, student, images, _ = _train(
            "ddaq",
            generator=generator,
            discrepancy_weight=weight,
            schedule=BEGUN,
            student=replace(TINY["student"], lr=0.0, scale_lr=0.0),
        )
        with torch.no_grad():
            outputs = student(images.images), teacher(images.images)
        distances.append(relative_distance(*outputs).item())
    assert distances[1] > 1.1 * distances[0]


def test_the_features_change_the_student():
    assert not _same(_train("ddaq", feature_weight=0.0)[1], _train("ddaq")[1])


def test_the_importance_changes_images_and_student():
    students, images = [], []
    for kind in ("sensitivity", "hessian", "static", "uniform"):
        _, student, made, _ = _train("ddaq", importance=kind, schedule=BEGUN)
        students.append(student)
        images.append(made.images)
    for i in range(4):
        for j in range(i):
            assert not _same(students[i], students[j])
            assert not torch.equal(images[i], images[j])


def test_the_discrepancy_on_held_out_images_falls_while_the_student_learns():
    """Monitor 9: images of another generator, before and after."""
    held_out = _train("ddaq", seed=5)[2].images
    schedule = replace(TINY["schedule"], steps_per_batch=150, batch_size=32)
    distances = []

    def listen(stage, step, steps, **values):
        if stage == "distill":
            with torch.no_grad():
                outputs = student(held_out), teacher(held_out)
            distances.append(relative_distance(*outputs).item())

    teacher, student = _teacher(), prepare(_teacher(), "w2a4", edge_bits=4, data=DATA)
    changes = {"schedule": schedule, "student": replace(TINY["student"], lr=2e-3)}
    config = replace(METHODS["ddaq"].efforts["default"], **TINY | changes)
    rng = torch.Generator().manual_seed(0)
    METHODS["ddaq"].run(teacher, student, DATA, config, rng=rng, report=listen)
    assert sum(distances[-20:]) < 0.9 * sum(distances[:20])


def test_the_student_is_held_still_while_the_generator_learns():
    """No gradient of a generator step is left in it, and it may learn again afterwards."""
    _, student, *_ = _train("ddaq", schedule=BEGUN)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_feature_distance_is_relative():
    teacher = {"a": torch.full((2, 3), 2.0), "b": torch.full((4,), -100.0)}
    student = {"a": torch.full((2, 3), 3.0), "b": torch.full((4,), -100.0)}
    expected = torch.tensor([0.5, 0.0])
    torch.testing.assert_close(feature_distance(student, teacher, ["a", "b"]), expected)
    with pytest.raises(KeyError):
        feature_distance(student, teacher, ["c"])

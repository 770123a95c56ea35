from dataclasses import replace

import pytest
import torch
from torch import nn

from dfq.synthesize.inversion import MIXMIX_INVERSION, InversionConfig, inverted_batches
from dfq.synthesize.losses import total_variation
from dfq.synthesize.teachers import TeacherSampler
from tests.synthesize.test_generate import DATA, _teacher
from tests.synthesize.test_latents import _strided

TINY = InversionConfig(batch_size=16, batches=2, steps=6, shift=1)


def _run(config=TINY, teachers=None, seed=0, mode="batch", per_batch=2):
    lines = []
    sampler = TeacherSampler(
        [[t] for t in teachers or [_teacher()]], per_batch=per_batch, mode=mode
    )
    made = inverted_batches(
        sampler,
        DATA,
        config,
        rng=torch.Generator().manual_seed(seed),
        report=lambda stage, step, steps, **values: lines.append((stage, step, steps, values)),
    )
    return list(made), lines


def _differ(first, second):
    return not torch.equal(first[0][0].images, second[0][0].images)


@pytest.mark.parametrize(
    "config", [replace(TINY, class_weight=0.1), replace(MIXMIX_INVERSION, batch_size=16, shift=1)]
)
def test_images_come_near_to_the_statistics_and_to_their_classes(config):
    _, lines = _run(replace(config, batches=1, steps=80, mixed=0.0))
    first, last = lines[0][-1], lines[-1][-1]
    assert float(last["bn_loss"]) < 0.3 * float(first["bn_loss"])
    assert float(last["class_loss"]) < 0.8 * float(first["class_loss"])


def test_a_pyramid_comes_nearer_than_pixels_in_as_many_steps():
    config = replace(TINY, batches=1, steps=30, lr=0.05)
    plain, smooth = (
        float(_run(replace(config, levels=levels))[1][-1][-1]["bn_loss"]) for levels in (1, 3)
    )
    assert smooth < 0.8 * plain


def test_the_second_teacher_changes_the_images_and_is_heard():
    first, second = _teacher(), _strided()
    second[1].running_mean += 1
    both = _run(teachers=[first, second])
    assert _differ(both, _run(teachers=[first]))
    assert _differ(both, _run(teachers=[second]))
    config = replace(TINY, batches=1, steps=60, mixed=0.0, swing=False)
    mismatch = [
        _run(config, teachers)[1][-1][-1]["bn_loss"] for teachers in ([first], [first, second])
    ]
    assert mismatch[1] > 1.2 * mismatch[0]  # both are to be content


@pytest.mark.parametrize(
    "change",
    [
        {"mixed": 0.0},
        {"swing": False},
        {"shift": None},
        {"levels": 1},
        {"class_weight": 0.0},
        {"variation_weight": 1.0},
        {"norm_weight": 1.0},
        {"bn_moment": "var"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_changes_the_images(change):
    teachers = [_strided()]
    assert _differ(_run(teachers=teachers), _run(replace(TINY, **change), teachers))


def test_total_variation_and_norm_do_what_they_are_for():
    config = replace(TINY, batches=1, steps=40, bn_weight=0.0, class_weight=0.0, levels=1)
    (plain, *_), _ = _run(replace(config, variation_weight=0.0, norm_weight=0.0))
    (smooth, *_), _ = _run(replace(config, variation_weight=1.0))
    (small, *_), _ = _run(replace(config, norm_weight=1.0))
    assert total_variation(smooth.images).mean() < 0.5 * total_variation(plain.images).mean()
    assert small.images.square().mean() < 0.5 * plain.images.square().mean()


def test_the_mode_of_the_sampler_changes_the_images():
    teachers = [_teacher(), _strided()]
    assert _differ(*(_run(teachers=teachers, per_batch=1, mode=m) for m in ("batch", "step")))


def test_same_seed_same_images_and_the_teachers_are_left_as_they_were():
    teachers = [_strided(), _teacher()]
    before = [t.state_dict() for t in teachers]
    first, again = _run(teachers=teachers), _run(teachers=teachers)
    assert not _differ(first, again)
    assert _differ(first, _run(teachers=teachers, seed=1))
    for teacher, state in zip(teachers, before, strict=True):
        torch.testing.assert_close(teacher.state_dict(), state, rtol=0, atol=0)
        assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in teacher.modules())


def test_hooks_are_removed_when_it_fails():
    teacher = _strided()
    teacher.append(nn.Linear(5, 4))  # does not fit
    with pytest.raises(RuntimeError):
        _run(teachers=[teacher])
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in teacher.modules())


def test_progress_counts_every_step_once_and_labels_are_spread_evenly():
    made, lines = _run()
    assert [line[:3] for line in lines] == [("synthesize", n, 12) for n in range(1, 13)]
    for images, labels in made:
        assert images.shape == (16, 3, 8, 8)
        assert images.dtype == torch.float32
        assert not images.requires_grad
        assert torch.bincount(labels).tolist() == [4, 4, 4, 4]


def test_total_variation_by_hand():
    images = torch.tensor([[0.0, 1.0], [3.0, 1.0]]).reshape(1, 1, 2, 2)
    torch.testing.assert_close(total_variation(images), torch.tensor([(3 + 0) / 2 + (1 + 2) / 2]))

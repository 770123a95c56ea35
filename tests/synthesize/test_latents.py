from dataclasses import replace

import pytest
import torch
from torch import nn

from dfq.synthesize.bn_stats import capture_bn_statistics
from dfq.synthesize.generators import StagedGenerator
from dfq.synthesize.latents import (
    GENIE_LATENTS,
    LatentConfig,
    LatentGenerator,
    PlateauDecay,
    distilled_batches,
)
from dfq.synthesize.losses import bn_mismatch, image_mismatch
from dfq.types import DataSpec
from tests.synthesize.test_generate import DATA, _teacher

TINY = LatentConfig(
    batch_size=16,
    batches=2,
    steps=6,
    first_steps=2,
    latent_dim=8,
    keep_generator=False,
    lr=0.01,
)
RAW = DataSpec(shape=(3, 8, 8), classes=4)


def _run(config, seed=0, teacher=None):
    lines = []
    rng = torch.Generator().manual_seed(seed)
    made = distilled_batches(
        teacher or _teacher(),
        DATA,
        config,
        rng=rng,
        report=lambda stage, step, steps, **values: lines.append((step, steps, values)),
    )
    return list(made), lines


def _strided():
    """A teacher whose second convolution has stride 2."""
    torch.manual_seed(3)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    body += [nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("config", [TINY, replace(GENIE_LATENTS, batch_size=16, latent_dim=8)])
def test_images_come_near_to_the_statistics(config):
    _, lines = _run(replace(config, batches=1, steps=120, first_steps=0))
    losses = [float(values["bn_loss"] + values["image_loss"]) for *_, values in lines]
    assert losses[-1] < 0.2 * losses[0]


def _shifted():
    """A teacher whose statistics are far from those of anything a fresh generator makes."""
    teacher = _teacher()
    teacher[1].running_mean += 0.5
    teacher[1].running_var *= 3
    return teacher


def test_latents_learn_too():
    config = replace(TINY, batches=1, steps=60, lr=0.0, bfloat16=False, image_weight=0.0)
    learned = [float(v["bn_loss"]) for *_, v in _run(config, teacher=_shifted())[1]]
    still = [
        float(v["bn_loss"]) for *_, v in _run(replace(config, latent_lr=0.0), teacher=_shifted())[1]
    ]
    assert still[-1] == still[0]
    assert learned[-1] < 0.9 * learned[0]


def test_a_kept_generator_begins_where_the_last_batch_ended():
    config = replace(TINY, steps=60, first_steps=0)
    _, fresh = _run(config, teacher=_shifted())
    _, kept = _run(replace(config, keep_generator=True), teacher=_shifted())
    assert float(kept[60][2]["bn_loss"]) < 0.8 * float(fresh[60][2]["bn_loss"])


@pytest.mark.parametrize("keep", [False, True])
def test_progress_counts_every_step_once(keep):
    made, lines = _run(replace(TINY, keep_generator=keep))
    total = 14 if keep else 12  # only a kept generator needs a longer first batch
    assert [len(batch.images) for batch in made] == [16, 16]
    assert [(step, steps) for step, steps, _ in lines] == [(n, total) for n in range(1, total + 1)]


def test_swing_changes_the_images():
    plain = _run(replace(TINY, swing=False), teacher=_strided())[0]
    moved = _run(TINY, teacher=_strided())[0]
    assert not torch.equal(plain[0].images, moved[0].images)


def test_same_seed_same_images_and_the_teacher_is_left_as_it_was():
    teacher = _strided()
    first, second, other = (_run(TINY, seed, teacher)[0] for seed in (0, 0, 1))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0].images, other[0].images)
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in teacher.modules())


def test_labels_are_the_teachers_and_images_carry_no_graph():
    teacher = _teacher()  # has no stride, so its answers are those of the last step
    (first, *_), _ = _run(TINY, teacher=teacher)
    assert torch.equal(first.labels, teacher(first.images).argmax(1))
    assert first.images.dtype == torch.float32
    assert not first.images.requires_grad


@pytest.mark.parametrize(("data", "mean", "std"), [(DATA, 0.0, 1.0), (RAW, 0.5, 0.25)])
def test_generator_ends_in_the_space_of_the_images(data, mean, std):
    images = LatentGenerator(data, 8)(torch.randn(64, 8))
    assert images.shape == (64, 3, 8, 8)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.full((3,), mean), atol=0.01, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.full((3,), std), atol=0.01, rtol=0)


def test_generator_makes_odd_sizes():
    data = DataSpec(shape=(1, 7, 10), classes=2)
    assert LatentGenerator(data, 4)(torch.randn(2, 4)).shape == (2, 1, 7, 10)


def test_plateau_decay_is_that_of_pytorch():
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=3, min_lr=1e-4)
    lr = torch.tensor(0.1)
    ours = PlateauDecay(lr, patience=3, minimum=1e-4)
    rates = set()
    for step in range(60):
        loss = torch.tensor(1.0 / (step + 1) if step < 8 or 30 < step < 40 else 0.2)
        ours.step(loss)
        theirs.step(float(loss))
        rate = optimizer.param_groups[0]["lr"]
        rates.add(round(rate, 6))
        torch.testing.assert_close(lr, torch.tensor(rate))
    assert rates == {0.1, 0.01, 0.001, 0.0001}


def test_image_mismatch_by_hand():
    """Channel 0: mean 3, unbiased deviation 2; channel 1: mean 1, deviation 1."""
    first = torch.tensor([1.0, 3.0, 5.0])
    second = torch.tensor([0.0, 1.0, 2.0])
    images = torch.stack((first, second)).reshape(1, 2, 1, 3)
    expected = torch.tensor([(3**2 + (2 - 1) ** 2 + 1 + 0) / 2])
    torch.testing.assert_close(image_mismatch(images, 0.0, 1.0), expected)
    torch.testing.assert_close(image_mismatch(images * 0.25 + 0.5, 0.5, 0.25), expected)


def test_image_mismatch_has_a_gradient_for_flat_images():
    images = torch.zeros(1, 3, 4, 4, requires_grad=True)
    image_mismatch(images, 0.0, 1.0).sum().backward()
    assert images.grad.isfinite().all()


@pytest.mark.parametrize(("stages", "size"), [(None, 64), (None, 65), (True, 8), (False, 65)])
def test_large_images_are_made_in_stages_unless_told(stages, size, monkeypatch):
    made = []
    for kind in (LatentGenerator, StagedGenerator):
        monkeypatch.setattr(
            f"dfq.synthesize.latents.{kind.__name__}",
            lambda data, dim, kind=kind: made.append(kind) or kind(data, dim, width=8),
        )
    config = replace(TINY, batch_size=2, batches=1, steps=1, first_steps=0, stages=stages)
    data = DataSpec((3, size, size), classes=4)
    rng = torch.Generator().manual_seed(0)
    ((images, _),) = distilled_batches(_teacher(), data, config, rng=rng)
    assert made == [
        StagedGenerator if stages or (stages is None and size > 64) else LatentGenerator
    ]
    assert images.shape == (2, 3, size, size)


def test_relative_statistics_know_no_scale():
    """A layer whose activations are ten times as large counts the same."""
    found = {}
    for scale in (1.0, 10.0):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval().requires_grad_(False)
        for parameter in model[0].parameters():
            parameter.copy_(scale * torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        model[1].running_mean.fill_(scale)
        model[1].running_var.fill_(scale**2)
        with capture_bn_statistics(model) as stats:
            model(torch.linspace(-1, 1, 4 * 3 * 64).view(4, 3, 8, 8))
        for moment in ("std", "relative"):
            found[moment, scale] = bn_mismatch(stats, moment)
    torch.testing.assert_close(found["relative", 10.0], found["relative", 1.0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found["std", 1.0], found["relative", 1.0])
    torch.testing.assert_close(found["std", 10.0], 100 * found["std", 1.0], rtol=1e-4, atol=0)

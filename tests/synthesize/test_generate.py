from dataclasses import replace

import pytest
import torch
from torch import nn

from dfq.synthesize.generate import (
    GDFQ_GENERATOR,
    GeneratorConfig,
    generated_batches,
)
from dfq.types import DataSpec

DATA = DataSpec(shape=(3, 8, 8), classes=4, mean=(0.5,) * 3, std=(0.25,) * 3)
TINY = GeneratorConfig(batch_size=16, steps_per_batch=12, first_steps=5, latent_dim=8)


def _teacher():
    torch.manual_seed(1)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    model[1].momentum = None  # the running statistics are those of the data below
    smooth = nn.functional.interpolate(torch.randn(64, 3, 3, 3), (8, 8), mode="bilinear")
    var, mean = torch.var_mean(smooth, dim=(0, 2, 3), keepdim=True)
    model.train()((smooth - mean) / var.sqrt())
    return model.eval().requires_grad_(False)


def _run(config, batches=3, seed=0, report=None):
    lines = []
    record = report or (lambda stage, step, steps, **values: lines.append((step, steps, values)))
    rng = torch.Generator().manual_seed(seed)
    made = list(generated_batches(_teacher(), DATA, config, batches, rng=rng, report=record))
    return made, lines


@pytest.mark.parametrize("config", [TINY, replace(GDFQ_GENERATOR, batch_size=16)])
def test_batches_come_near_to_the_statistics(config):
    config = replace(config, steps_per_batch=60, class_weight=0.0, lr=1e-2)
    _, lines = _run(config, batches=1)
    losses = [float(values["bn_loss"]) for *_, values in lines]
    assert losses[-1] < 0.2 * losses[0]


def test_progress_counts_every_step_once():
    made, lines = _run(TINY)
    assert len(made) == 3
    assert [step for step, *_ in lines] == list(range(1, 42))
    assert {steps for _, steps, _ in lines} == {41}


def test_same_seed_same_images_and_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    first, second, other = _run(TINY)[0], _run(TINY)[0], _run(TINY, seed=1)[0]
    _teacher()
    torch.manual_seed(0)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0].images, other[0].images)


def test_images_carry_no_graph_and_labels_are_classes():
    (first, *_), _ = _run(TINY, batches=1)
    assert first.images.shape == (16, 3, 8, 8)
    assert first.images.dtype == torch.float32
    assert not first.images.requires_grad
    assert set(first.labels.tolist()) <= set(range(4))


def test_learned_latents_fit_a_batch_better_than_fixed_ones():
    _, learned = _run(replace(TINY, steps_per_batch=40))
    _, fixed = _run(replace(TINY, steps_per_batch=40, latent_lr=0.0))
    assert learned[-1][2]["bn_loss"] < fixed[-1][2]["bn_loss"]

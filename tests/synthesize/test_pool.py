from dataclasses import replace

import pytest
import torch

from dfq.synthesize.pool import ImagePool, Schedule, augment, gather, given_batches, lessons
from dfq.types import Images, InputError


def _batch(*labels):
    labels = torch.tensor(labels)
    return labels.float().view(-1, 1, 1, 1).expand(-1, 2, 4, 4), labels


def test_the_oldest_leave_first():
    pool = ImagePool(5)
    for batch in (_batch(0, 1), _batch(2, 3), _batch(4, 5)):
        pool.add(*batch)
    images, labels = pool.all()
    assert sorted(labels.tolist()) == [1, 2, 3, 4, 5]
    assert torch.equal(images[:, 0, 0, 0], labels.float())


def test_a_batch_larger_than_the_pool_leaves_its_end():
    pool = ImagePool(2)
    pool.add(*_batch(0, 1, 2))
    assert sorted(pool.all().labels.tolist()) == [1, 2]
    assert len(pool) == 2


def test_samples_are_images_with_their_labels_and_reach_all():
    pool = ImagePool(8)
    pool.add(*_batch(3, 4, 5))
    images, labels = pool.sample(200, torch.Generator().manual_seed(0))
    assert torch.equal(images[:, 1, 2, 3], labels.float())
    assert set(labels.tolist()) == {3, 4, 5}


def test_pool_keeps_no_graph():
    pool = ImagePool(4)
    images = torch.ones(2, 1, 2, 2, requires_grad=True) * 2
    pool.add(images, torch.zeros(2, dtype=torch.int64))
    assert not pool.all().images.requires_grad


def test_an_empty_pool_says_so():
    with pytest.raises(ValueError, match="add a batch first"):
        ImagePool(4).all()


def test_augment_flips_and_shifts_but_invents_no_pixel():
    images = torch.arange(16.0).expand(400, 1, 4, 16).contiguous()  # value = column
    rng = torch.Generator().manual_seed(0)
    steps = augment(images, 0, rng).diff(dim=3)
    assert set(steps.unique().tolist()) == {-1.0, 1.0}
    flipped = (steps[:, 0, 0, 0] < 0).float().mean()
    assert 0.4 < flipped < 0.6
    shifted = augment(images, 3, rng)
    assert shifted.shape == images.shape
    assert set(shifted.unique().tolist()) <= set(range(16))


def test_augment_none_is_the_identity():
    images = torch.randn(2, 3, 4, 4)
    assert augment(images, None, torch.Generator()) is images


def _batches(count):
    """Batches of 4 images whose pixels and labels are the number of the batch."""
    for batch in range(count):
        yield Images(torch.full((4, 1, 6, 6), float(batch)), torch.full((4,), batch))


SCHEDULE = Schedule(
    batches=4, warmup_batches=2, pool_batches=2, steps_per_batch=3, batch_size=40, shift=1
)


def test_lessons_begin_after_the_warm_up_and_draw_from_the_latest_batches():
    seen = [
        (lesson.step, lesson.steps, set(lesson.labels.tolist()), len(lesson.pool.images))
        for lesson in lessons(_batches(4), SCHEDULE, rng=torch.Generator().manual_seed(0))
    ]
    batches = [{0, 1}] * 3 + [{1, 2}] * 3 + [{2, 3}] * 3
    assert seen == [(step, 9, batches[step], 8) for step in range(9)]


def test_lessons_pair_images_with_their_labels_and_follow_the_seed():
    def run(seed):
        rng = torch.Generator().manual_seed(seed)
        return list(lessons(_batches(4), SCHEDULE, rng=rng))

    for lesson in run(0):
        assert torch.equal(lesson.images[:, 0, 3, 3], lesson.labels.float())
    labels = [torch.cat([lesson.labels for lesson in run(seed)]) for seed in (0, 0, 1)]
    assert torch.equal(labels[0], labels[1])
    assert not torch.equal(labels[0], labels[2])


def test_batches_are_made_no_earlier_than_needed():
    made = []

    def batches():
        for batch in _batches(4):
            made.append(batch)
            yield batch

    first = next(lessons(batches(), SCHEDULE, rng=torch.Generator()))
    assert first.step == 0
    assert len(made) == 2


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"warmup_batches": 5}, "warmup_batches"),
        ({"warmup_batches": 0}, "warmup_batches"),
        ({"pool_batches": 0}, "pool_batches"),
        ({"steps_per_batch": 0}, "steps_per_batch"),
        ({"batch_size": 0}, "batch_size"),
        ({"least_area": 0.0}, "least_area"),
    ],
)
def test_a_schedule_without_lessons_is_refused(change, field):
    with pytest.raises(InputError, match=field):
        replace(SCHEDULE, **change)


def test_augment_mirrors_the_edge_and_hands_every_pixel_its_gradient():
    images = torch.arange(24.0).reshape(1, 1, 4, 6).requires_grad_()
    rng = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(40):
        moved = augment(images, 2, rng)
        padded = torch.nn.functional.pad(images, (2,) * 4, mode="reflect")
        cuts = [padded[..., t : t + 4, l : l + 6] for t in range(5) for l in range(5)]  # noqa: E741
        seen |= {n for n, cut in enumerate(cuts) if torch.equal(cut, moved)}
    assert len(seen) > 8  # the others are flipped
    moved.sum().backward()
    assert images.grad.sum() == 24


def test_gather_joins_batches_and_cuts_what_is_too_much():
    batches = [Images(*_batch(0, 1)), Images(*_batch(2, 3))]
    assert gather(batches).labels.tolist() == [0, 1, 2, 3]
    images, labels = gather(batches, 3)
    assert labels.tolist() == [0, 1, 2]
    assert torch.equal(images[:, 0, 0, 0], labels.float())


@pytest.mark.parametrize(("pool", "parts"), [(1, [[0, 1, 2]] * 2), (2, [[0, 1], [2, 0]])])
def test_given_images_fill_the_pool(pool, parts):
    schedule = Schedule(batches=2, warmup_batches=1, pool_batches=pool)
    made = list(given_batches(Images(*_batch(0, 1, 2)), schedule))
    assert [batch.labels.tolist() for batch in made] == parts

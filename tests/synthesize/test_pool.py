import pytest
import torch

from dfq.synthesize.pool import ImagePool, augment


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

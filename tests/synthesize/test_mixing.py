import pytest
import torch
import torch.nn.functional as F

from dfq.synthesize.mixing import mix
from dfq.types import InputError

CLASSES = 5


def _batch(count=64, height=8, width=6):
    """Image n is n everywhere, and of class n % 5."""
    images = torch.arange(float(count))[:, None, None, None].expand(count, 2, height, width)
    labels = F.one_hot(torch.arange(count) % CLASSES, CLASSES).float()
    return images.clone(), labels


def _rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_label_is_exactly_the_share_of_the_pixels():
    images, labels = _batch()
    mixed = mix(images, labels, 1.0, _rng())
    for image, label in zip(mixed.images, mixed.labels, strict=True):
        found = torch.zeros(CLASSES)
        for value in image[0].flatten().tolist():
            found[int(value) % CLASSES] += 1
        torch.testing.assert_close(label, found / 48, rtol=0, atol=1e-6)


def test_what_is_pasted_is_one_box_of_one_other_image():
    images, labels = _batch()
    for n, image in enumerate(mix(images, labels, 1.0, _rng()).images):
        foreign = image[0] != n
        assert len(image[0][foreign].unique()) <= 1
        assert torch.equal(image[0], image[1])
        if foreign.any():
            rows, columns = foreign.any(1).nonzero(), foreign.any(0).nonzero()
            height, width = (int(side.max() - side.min()) + 1 for side in (rows, columns))
            assert int(foreign.sum()) == height * width


def test_boxes_have_every_size_and_lie_everywhere():
    images, labels = _batch(400)
    mixed = mix(images, labels, 1.0, _rng()).images[:, 0]
    foreign = mixed != torch.arange(400.0)[:, None, None]
    shares = foreign.float().mean((1, 2))
    assert 0.45 < shares.mean() < 0.55  # uniform from 0 to 1
    assert shares.min() < 0.05
    assert shares.max() > 0.95
    assert foreign.float().mean(0).min() > 0.2  # corners too


def test_gradients_reach_both_images_of_a_pair():
    images, labels = _batch()
    images.requires_grad_()
    chosen = mix(images, labels, 1.0, _rng())
    n = int((chosen.labels > 0).sum(1).argmax())
    (grad,) = torch.autograd.grad(chosen.images[n].sum(), images)
    givers = grad.abs().sum((1, 2, 3)).nonzero().flatten().tolist()
    assert len(givers) == 2
    assert n in givers
    assert grad.sum() == chosen.images[n].numel()  # every pixel comes from one of them


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.5, 0.4, 0.6), (1.0, 0.9, 1)])
def test_the_share_says_how_many_are_mixed(share, low, high):
    images, labels = _batch(400)
    mixed = mix(images, labels, share, _rng())
    changed = (mixed.images != images).any(3).any(2).any(1).float().mean()
    assert low <= changed <= high
    torch.testing.assert_close(mixed.labels.sum(1), torch.ones(400))


def test_same_seed_same_mixture_and_one_image_stays():
    images, labels = _batch()
    first, again, other = (mix(images, labels, 0.5, _rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(mix(images[:1], labels[:1], 1.0, _rng()).images, images[:1])


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(InputError, match="0 to 1"):
        mix(*_batch(), share, _rng())

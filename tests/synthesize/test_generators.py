import pytest
import torch

from dfq.synthesize.generators import ConditionalGenerator, StagedGenerator
from dfq.types import DataSpec


@pytest.mark.parametrize("conditioning", ["embedding", "batchnorm"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 9, 14), (4, 8, 8)], ids=str)
def test_any_image_shape(shape, conditioning):
    data = DataSpec(shape=shape, classes=5, mean=(0.5,) * shape[0])
    generator = ConditionalGenerator(data, 12, width=8, conditioning=conditioning)
    images = generator(torch.randn(6, 12), torch.arange(6) % 5)
    assert images.shape == (6, *shape)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(shape[0]), atol=1e-4, rtol=0)


def test_images_of_a_model_without_normalization_lie_in_its_range():
    data = DataSpec(shape=(3, 16, 16), classes=2)
    images = ConditionalGenerator(data, 8, width=8)(torch.randn(9, 8), torch.arange(9) % 2)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.full((3,), 0.5), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.full((3,), 0.25), atol=1e-3, rtol=0)


def test_form_follows_image_size():
    small = ConditionalGenerator(DataSpec(shape=(3, 64, 64), classes=2), width=4)
    large = ConditionalGenerator(DataSpec(shape=(3, 65, 65), classes=2), width=4)
    assert small.embedding is not None
    assert large.embedding is None


@pytest.mark.parametrize("conditioning", ["embedding", "batchnorm"])
def test_the_label_matters(conditioning):
    data = DataSpec(shape=(3, 16, 16), classes=3)
    generator = ConditionalGenerator(data, 8, width=8, conditioning=conditioning).eval()
    for norm in generator.norms:
        for embedding in norm.children():
            if isinstance(embedding, torch.nn.Embedding):
                torch.nn.init.normal_(embedding.weight)  # as if trained: it starts equal
    latents = torch.randn(1, 8).expand(2, 8)
    first, second = generator(latents, torch.tensor([0, 1]))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("shape", [(3, 72, 100), (1, 9, 14), (4, 33, 16), (3, 5, 5)], ids=str)
def test_stages_reach_any_image_shape(shape):
    images = StagedGenerator(DataSpec(shape), 12, width=32)(torch.randn(6, 12))
    assert images.shape == (6, *shape)
    torch.testing.assert_close(
        images.mean((0, 2, 3)), torch.full(shape[:1], 0.5), atol=1e-4, rtol=0
    )


def test_stages_begin_small_and_halve_their_channels():
    generator = StagedGenerator(DataSpec((3, 352, 352)), 256)
    assert generator.start == (11, 11, 256)
    widths = [m.out_channels for m in generator.body if isinstance(m, torch.nn.Conv2d)]
    assert widths == [128, 64, 32, 16, 3]
    assert sum(p.numel() for p in generator.parameters()) < 9e6  # a quarter-size start: 255e6


def test_every_latent_and_every_stage_learns():
    generator, latents = StagedGenerator(DataSpec((3, 40, 40)), 8), torch.randn(4, 8)
    (generator(latents.requires_grad_()) ** 3).sum().backward()
    assert latents.grad.abs().amin() > 0
    assert all(p.grad.abs().max() > 0 for p in generator.parameters())

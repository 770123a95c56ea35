import pytest
import torch
from torch import nn

from dfq.synthesize import swing
from dfq.synthesize.swing import swing_convolutions


def _conv(stride=2):
    torch.manual_seed(2)
    return nn.Conv2d(3, 4, 3, stride, 1)


def _padded_and_cropped(x, top, left, pad):
    """What the paper describes: mirror the edges, then crop at an offset; ``pad`` is the center."""
    padded = nn.functional.pad(x, (pad,) * 4, mode="reflect")
    return padded[..., top : top + x.shape[2], left : left + x.shape[3]]


@pytest.mark.parametrize("stride", [2, 3, (1, 2)])
def test_it_moves_by_mirrored_padding_and_a_crop(stride):
    x, conv, rng = torch.randn(2, 3, 9, 8), _conv(stride), torch.Generator().manual_seed(0)
    tall, wide = conv.stride[0] - 1, conv.stride[1] - 1
    offsets = [(t, w) for t in range(-tall, tall + 1) for w in range(-wide, wide + 1)]
    expected = [conv(_padded_and_cropped(x, 2 + t, 2 + w, 2)) for t, w in offsets]
    seen = set()
    with swing_convolutions(conv, rng):
        for _ in range(100):
            y = conv(x)
            seen.update(index for index, e in enumerate(expected) if torch.equal(e, y))
    assert len(seen) == len(expected)


def test_in_the_center_it_is_the_plain_convolution(monkeypatch):
    x, conv = torch.randn(2, 3, 8, 8), _conv()
    plain = conv(x)
    monkeypatch.setattr(swing.torch, "randint", lambda *args, **kwargs: torch.tensor(0))
    with swing_convolutions(conv, torch.Generator()):
        assert torch.equal(conv(x), plain)


def test_it_is_undone_even_after_an_error():
    x, conv = torch.randn(2, 3, 8, 8), _conv()
    plain = conv(x)
    with pytest.raises(KeyError), swing_convolutions(conv, torch.Generator()):
        raise KeyError
    assert not conv._forward_pre_hooks
    assert torch.equal(conv(x), plain)


def test_convolutions_of_stride_one_and_maps_of_one_pixel_stay():
    rng = torch.Generator().manual_seed(0)
    plain, strided = _conv(1), _conv(2)
    x, pixel = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 1, 1)
    expected = plain(x), strided(pixel)
    with swing_convolutions(nn.ModuleList([plain, strided]), rng):
        for _ in range(9):
            assert torch.equal(plain(x), expected[0])
            assert torch.equal(strided(pixel), expected[1])


def test_gradients_flow_to_every_pixel():
    """Without swing a 1x1 convolution of stride 2 never sees three pixels of four."""
    conv, x = nn.Conv2d(1, 1, 1, 2), torch.zeros(1, 1, 8, 8, requires_grad=True)
    conv(x).sum().backward()
    assert (x.grad == 0).sum() == 48
    x.grad = None
    with swing_convolutions(conv, torch.Generator().manual_seed(0)):
        for _ in range(50):
            conv(x).sum().backward()
    assert (x.grad != 0).all()

"""Activations two in a byte: the same bits, where layers alone write and read them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dfq.deploy import freeze, load, pack_activations
from dfq.prepare import calibrate, prepare
from tests.deploy.test_freeze import IMAGE, images


class Wide(nn.Module):
    """A residual block, a depthwise layer and a narrow one, of 64 channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 128, 3, padding=1)
        self.second, self.third = nn.Conv2d(128, 64, 1), nn.Conv2d(64, 64, 1)
        self.depthwise = nn.Conv2d(64, 64, 3, groups=64)
        self.narrow, self.wide = nn.Conv2d(64, 40, 1), nn.Conv2d(40, 64, 1)
        self.last, self.head = nn.Conv2d(64, 64, 1), nn.Linear(64, 5)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        x = F.relu(x + self.second(F.relu(self.first(x))))
        x = self.depthwise(self.third(x))
        x = self.last(F.relu(self.wide(F.relu(self.narrow(x)))))
        return self.head(F.relu(x).mean((2, 3)))


@pytest.fixture(scope="module", params=["learned", "minmax"])
def packed(request):
    torch.manual_seed(0)
    student = prepare(Wide().eval(), "w4a4", scales=request.param)
    calibrate(student, images())
    return freeze(student, IMAGE)


def _outputs(model):
    """Of each layer, in their order: its dtype and zero."""
    values, found = {"input": images()}, []
    for step, run in zip(model.program.steps, model.bind(), strict=True):
        values[step.output] = y = run(*(values[name] for name in step.inputs))
        if step.op == "conv":
            found.append(y.dtype)
    return found


def test_the_same_bits(packed):
    again = pack_activations(packed)
    assert torch.equal(again(images()), packed(images()))
    assert torch.equal(again(images()[:1]), packed(images()[:1]))


def test_what_is_packed(packed):
    """``first`` for ``second``, and ``wide`` for ``last``.

    Not ``stem`` and sums, which others than layers read; ``third``, for the depthwise layer, and
    that; ``narrow``, of 40 channels; ``last``, for the mean.
    """
    packing = [dtype == torch.uint8 for dtype in _outputs(pack_activations(packed))]
    names = ["stem", "first", "second", "third", "depthwise", "narrow", "wide", "last"]
    assert [name for name, two in zip(names, packing, strict=True) if two] == ["first", "wide"]
    assert torch.uint8 not in _outputs(packed)


def test_of_eight_bits_nothing_is_packed():
    student = prepare(Wide().eval(), "w4a8")
    calibrate(student, images())
    model = freeze(student, IMAGE)
    assert pack_activations(model).program == model.program


def test_to_a_file_and_back(packed, tmp_path):
    again = pack_activations(packed)
    again.save(tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors")(images()), packed(images()))
    again.export(tmp_path / "m.pt2")
    loaded = torch.export.load(tmp_path / "m.pt2").module()
    assert torch.equal(loaded(images()), packed(images()))

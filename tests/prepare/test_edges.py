"""The layers where images enter and outputs leave."""

import pytest
import torch
from torch import nn

from dfq.prepare import describe, prepare
from dfq.prepare.edges import find_edges
from dfq.types import DataSpec, InputError


class Heads(nn.Module):
    """Two heads on a stem; what they give may go on in place, sideways and through containers."""

    def __init__(self, join=None):
        super().__init__()
        self.boxes, self.scores = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 2, 1)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.middle = nn.Conv2d(6, 6, 1)
        self.unused = nn.Conv2d(6, 6, 1)
        self.join = join or (lambda boxes, scores: {"boxes": boxes, "scores": [scores]})

    def forward(self, x):
        x = self.middle(self.stem(x))
        scores = self.scores(x).sigmoid_()
        return self.join(self.boxes(x).relu_(), scores)


NAMES = ["boxes", "scores", "stem.0", "middle"]
DATA = DataSpec((3, 6, 6))


def _bits(model, data, bits="w4a3", **options):
    rows = describe(prepare(model.eval(), bits, data=data, **options))
    return {row.name: (row.weight_bits, row.input_bits) for row in rows}


@pytest.mark.parametrize(
    "join",
    [None, lambda a, b: torch.cat((a, b), 1), lambda a, b: (a, b), lambda a, b: a * b[:, :1]],
)
def test_every_head_is_an_edge_of_a_model_of_maps(join):
    found = _bits(Heads(join), DATA)
    eight = {name for name, bits in found.items() if bits == (8, 8)}
    assert eight == {"stem.0", "boxes", "scores"}
    assert found["middle"] == (4, 8)
    assert _bits(Heads(join), DATA, edge_bits=5)["boxes"] == (5, 5)


def test_a_head_that_feeds_another_layer_too_is_an_edge():
    class Twice(Heads):
        def forward(self, x):
            x = self.stem(x)
            return self.middle(x), self.boxes(self.middle(x))

    assert find_edges(Twice(), NAMES, (3, 6, 6)).outputs == ["middle", "boxes"]


def test_a_classifier_has_one_last_layer():
    body = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 9)]
    model = nn.Sequential(*body, nn.Linear(9, 4)).eval()
    assert find_edges(model, ["0", "4", "5"], (3, 6, 6)).outputs == ["5"]
    found = _bits(model, DataSpec((3, 6, 6), classes=4))
    assert [found[name] for name in "045"] == [(8, 8), (4, 8), (8, 8)]


class Residual(nn.Module):
    """A stem whose output a block, its shortcut and, through a sum, a later block take in."""

    def __init__(self):
        super().__init__()
        self.tail = nn.Conv2d(6, 6, 1)
        self.body, self.shortcut = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.later = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.body(x) + self.shortcut(x)
        return self.tail(self.later(x + y)).mean((2, 3))


def test_all_that_take_in_the_first_output_alone_are_second_layers():
    names = ["tail", "body", "shortcut", "stem.0", "later"]
    model = Residual()
    edges = find_edges(model, names, (3, 6, 6))
    assert edges == (
        ["stem.0", "body", "shortcut", "later", "tail"],
        ["body", "shortcut"],
        ["tail"],
    )
    found = _bits(model, DataSpec((3, 6, 6), classes=6), "w4a3")
    assert [found[name][1] for name in ("body", "shortcut", "later")] == [8, 8, 3]


def test_two_parallel_classifiers_keep_the_rule_of_the_last_one():
    model = Heads(lambda a, b: a.mean((2, 3)) + b.mean((2, 3)).sum(1, keepdim=True))
    found = _bits(model, DataSpec((3, 6, 6), classes=4))
    assert (found["scores"], found["boxes"]) == ((4, 3), (8, 8))


def test_outputs_that_depend_on_no_layer_have_none():
    class Constant(Heads):
        def forward(self, x):
            self.stem(x)
            return x.round().detach()

    assert find_edges(Constant(), NAMES, (3, 6, 6)) == (["stem.0"], [], [])


def test_nothing_is_left_behind():
    model = Heads()
    before = {name: p.clone() for name, p in model.named_parameters()}
    edges = find_edges(model, NAMES, (3, 6, 6))
    assert edges.order == ["stem.0", "middle", "scores", "boxes"]
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_an_image_that_the_model_does_not_take_is_one_sentence():
    with pytest.raises(InputError, match=r"does not run on one image of shape \(1, 6, 6\)"):
        find_edges(Heads(), NAMES, (1, 6, 6))

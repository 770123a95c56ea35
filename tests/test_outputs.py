"""Logits and maps: what an output holds, and how far two are apart."""

import pytest
import torch

from dfq.outputs import are_logits, cast, labels, map_distance, map_errors, tensors


def test_tensors_come_in_the_order_of_their_containers():
    a, b, c, d = (torch.full((2, 1, 1), float(i)) for i in range(4))
    assert tensors(a) == [a]
    assert tensors({"z": a, "y": [b, (c,)], "x": {"w": d}}) == [a, b, c, d]


@pytest.mark.parametrize("output", [None, 3, {"boxes": None}, [torch.zeros(1), "name"]])
def test_what_is_no_tensor_is_named(output):
    with pytest.raises(TypeError, match=r"NoneType|int|str"):
        tensors(output)


def test_logits_are_one_matrix():
    assert are_logits(torch.zeros(2, 4))
    assert not are_logits(torch.zeros(2, 4, 1, 1))
    assert not are_logits([torch.zeros(2, 4)])


def test_labels_are_the_largest_logit_and_zero_of_maps():
    assert labels(torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])).tolist() == [1, 0]
    assert labels({"a": torch.rand(3, 5, 2, 2)}).tolist() == [0, 0, 0]


def test_cast_reaches_every_tensor():
    assert cast(torch.zeros(1), torch.float64).dtype == torch.float64
    found = cast((torch.zeros(1), {"a": torch.zeros(2)}), torch.float64)
    assert [part.dtype for part in found] == [torch.float64] * 2


def test_the_unit_of_a_channel_is_its_spread_but_at_least_the_average_one():
    """Channels that lie 3, 1 and 0 from their means: units 3, 4/3 and 4/3."""
    wanted = torch.tensor([[3.0, 1.0, 7.0], [-3.0, -1.0, 7.0]])[:, :, None, None]
    output = wanted.clone()
    output[0] += torch.tensor([3.0, 0.0, 0.0])[:, None, None]
    output[1] += torch.tensor([0.0, 4 / 3, 8 / 3])[:, None, None]
    expected = torch.tensor([1.0, 3.0]) / 3
    torch.testing.assert_close(map_distance(output, wanted), expected)
    torch.testing.assert_close(map_distance([output], [wanted], 2), torch.tensor([1.0, 5.0]) / 3)


def test_maps_of_any_size_and_scale_count_alike():
    small, large = torch.rand(4, 3, 2, 2), 1000 * torch.rand(4, 3, 16, 16)
    moved = small + 0.5 * (small - small.mean((0, 2, 3), keepdim=True)).abs().mean()
    distance = map_distance((moved, large), (small, large))
    torch.testing.assert_close(distance, map_distance(moved, small) / 2)


def test_map_errors_are_relative():
    wanted = [torch.full((2, 1, 4, 4), 2.0), torch.full((2, 3, 1, 1), -10.0)]
    assert map_errors([w + 1 for w in wanted], wanted) == pytest.approx([0.5, 0.1])

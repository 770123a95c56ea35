import pytest
import torch

from dfq.distill.weighting import TeacherWeightNet, weight_entropy, weighted_divergence

KINDS = ["image", "logits", "bank"]


def _net(kind):
    return TeacherWeightNet(kind, teachers=3, channels=2, classes=5)


def _scores(net):
    return net(torch.randn(4, 2, 16, 16), torch.randn(4, 4, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_all_teachers_start_equal(kind):
    assert torch.equal(_scores(_net(kind)), torch.zeros(4, 3))


@pytest.mark.parametrize("kind", ["image", "logits"])
def test_weights_are_of_the_image_once_trained(kind):
    net = _net(kind)
    torch.nn.init.normal_(net.body[-1].weight)
    scores = _scores(net)
    assert not torch.equal(scores[0], scores[1])


def _learn(objective, steps=400, **options):
    """Weights after training scores on three teachers of fixed divergence 1, 2 and 3."""
    divergence = torch.tensor([[1.0, 2.0, 3.0]]).expand(8, 3)
    net = TeacherWeightNet("bank", teachers=3, channels=1, classes=2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(steps):
        loss, weights = weighted_divergence(
            divergence, net(divergence, divergence), objective, **options
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return weights[0].detach()


def test_plain_softmax_collapses_to_the_easiest_teacher():
    weights = _learn("softmax")
    assert weights[0] > 0.95
    assert weight_entropy(weights[None]) < 0.25


def test_uncertainty_weighs_by_the_inverse_divergence():
    # d/ds (exp(-s) D + s) = 0 at s = log D, so the weights go as 1/D
    torch.testing.assert_close(
        _learn("uncertainty"), torch.tensor([6.0, 3.0, 2.0]) / 11, atol=2e-3, rtol=0
    )


def test_entropy_bonus_stops_at_its_softmax():
    # minimizing a.D - eta H(a) over the simplex gives a = softmax(-D / eta)
    expected = torch.softmax(-torch.tensor([1.0, 2.0, 3.0]) / 2.0, 0)
    weights = _learn("entropy", entropy_weight=2.0)
    torch.testing.assert_close(weights, expected, atol=2e-3, rtol=0)


def test_adversarial_goes_to_the_worst_matched_teacher():
    assert _learn("adversarial")[2] > 0.95


def test_adversarial_still_pulls_the_student_down():
    divergence = torch.ones(2, 3, requires_grad=True)
    loss, _ = weighted_divergence(divergence, torch.zeros(2, 3), "adversarial")
    loss.sum().backward()
    torch.testing.assert_close(divergence.grad, torch.full((2, 3), 1 / 3))


def test_entropy_is_one_when_equal_and_zero_when_one_rules():
    equal, one = torch.full((2, 4), 0.25), torch.eye(4)
    torch.testing.assert_close(weight_entropy(equal), torch.tensor(1.0))
    assert weight_entropy(one) == 0

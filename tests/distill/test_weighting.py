import pytest
import torch
from torch import nn
from torch.func import functional_call

from dfq.distill.losses import kd_divergence, multi_teacher_divergence
from dfq.distill.meta import teacher_effects
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


def test_uncertainty_stays_finite_where_a_teacher_is_matched_exactly():
    # the score of a divergence of 0 falls for ever, and exp(200) * 0 is no number
    scores = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    loss, weights = weighted_divergence(torch.tensor([[0.0, 1.0]]), scores, "uncertainty")
    loss.sum().backward()
    assert scores.grad.isfinite().all()
    assert loss.item() == -9.0  # -10 of the first, 1 of the second
    torch.testing.assert_close(weights[0, 1], torch.tensor(1 / (1 + 2.718281828**10)))


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


def _unlearned(kind, images=4, **options):
    """The weights of a net that has no parameters."""
    net = TeacherWeightNet(kind, teachers=3, channels=2, classes=5, **options)
    assert not list(net.parameters())
    return net(torch.zeros(images, 2, 16, 16), torch.zeros(images, 4, 5)).softmax(1)


def test_static_weights_are_those_given_over_their_sum():
    weights = _unlearned("static", static_weights=(6.0, 3.0, 1.0))
    torch.testing.assert_close(weights, torch.tensor([[0.6, 0.3, 0.1]]).expand(4, 3))
    assert torch.equal(_unlearned("static"), torch.full((4, 3), 1 / 3))


def test_random_weights_are_even_over_all_that_sum_to_one():
    rng = torch.Generator().manual_seed(0)
    weights = _unlearned("random", images=100_000, rng=rng)
    # Dirichlet(1, 1, 1): mean 1/3, variance 1/18, and a weight is above 1/2 in a quarter of cases
    torch.testing.assert_close(weights.mean(0), torch.full((3,), 1 / 3), atol=5e-3, rtol=0)
    torch.testing.assert_close(weights.var(0), torch.full((3,), 1 / 18), atol=1e-3, rtol=0)
    above = (weights > 0.5).float().mean(0)
    torch.testing.assert_close(above, torch.full((3,), 0.25), atol=5e-3, rtol=0)


def test_random_weights_are_of_the_generator_alone():
    first, second, other = (
        _unlearned("random", rng=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_meta_leaves_the_scores_out_of_the_loss_of_the_student():
    divergence = torch.ones(2, 3, requires_grad=True)
    scores = torch.tensor([[0.0, 1.0, 2.0]]).expand(2, 3).clone().requires_grad_()
    loss, weights = weighted_divergence(divergence, scores, "meta")
    loss.sum().backward()
    assert scores.grad is None
    assert torch.equal(divergence.grad, weights.detach())
    weights[:, 0].sum().backward()  # what the effects reach them by
    assert scores.grad[0, 0] > 0


class _Bilevel:
    """A float student of two parameter groups, three teachers and two batches, in float64."""

    def __init__(self):
        rng = torch.Generator().manual_seed(3)

        def draw(*shape):
            return torch.randn(*shape, dtype=torch.float64, generator=rng)

        self.student = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        for parameter in self.student.parameters():
            parameter.data = draw(*parameter.shape)
        first, last = self.student[0].parameters(), self.student[2].parameters()
        groups = [{"params": list(first), "lr": 0.3}, {"params": list(last), "lr": 0.7}]
        self.optimizer = torch.optim.SGD(groups)
        self.images, self.held_out = draw(7, 6), draw(4, 6)
        self.logits, self.wanted = list(draw(3, 7, 5)), draw(4, 5)

    def effects(self, weights):
        divergence = multi_teacher_divergence(self.student(self.images), self.logits, 2.0)
        effects = teacher_effects(
            *(self.student, self.optimizer, divergence, weights),
            *(self.held_out, self.wanted, 2.0),
        )
        divergence.sum().backward()  # the graph is kept
        return effects

    def exact(self, weights):
        """The derivative of the held-out divergence by the weights, through the virtual step."""
        divergence = multi_teacher_divergence(self.student(self.images), self.logits, 2.0)
        names, parameters = zip(*self.student.named_parameters(), strict=True)
        loss = (weights * divergence).sum(1).mean()
        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
        rates = (0.3, 0.3, 0.7, 0.7)
        moved = [p - r * g for p, r, g in zip(parameters, rates, slopes, strict=True)]
        logits = functional_call(
            self.student, dict(zip(names, moved, strict=True)), (self.held_out,)
        )
        held_out = kd_divergence(logits, self.wanted, 2.0).mean()
        return torch.autograd.grad(held_out, weights)[0]


def test_effects_are_the_exact_derivative_where_images_share_their_weights():
    case = _Bilevel()
    shared = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(case.effects(shared.expand(7, 3)), case.exact(shared))


def test_effects_are_summed_over_images_where_the_step_is_that_of_the_mean_weights():
    """What is kept of single weights that differ: their sum over images, at the mean's step."""
    case = _Bilevel()
    spread = torch.linspace(-0.1, 0.1, 7, dtype=torch.float64)[:, None]
    mean = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    weights = mean + spread * torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    single = mean.expand(7, 3).clone().requires_grad_()
    torch.testing.assert_close(case.effects(weights), case.exact(single).sum(0))


def test_effects_leave_the_student_alone():
    case = _Bilevel()
    before = [parameter.clone() for parameter in case.student.parameters()]
    divergence = multi_teacher_divergence(case.student(case.images), case.logits, 2.0)
    weights = torch.full((7, 3), 1 / 3, dtype=torch.float64, requires_grad=True)
    batch = (case.held_out, case.wanted, 2.0)
    effects = teacher_effects(case.student, case.optimizer, divergence, weights, *batch)
    assert not effects.requires_grad
    assert all(map(torch.equal, case.student.parameters(), before))
    assert all(parameter.grad is None for parameter in case.student.parameters())

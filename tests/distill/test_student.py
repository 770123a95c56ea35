import torch
from torch import nn

from dfq.descent import anneal, descend
from dfq.distill.student import GDFQ_STUDENT, StudentConfig, student_optimizer


def _parameters():
    return [nn.Parameter(torch.ones(2))], [nn.Parameter(torch.ones(1))]


def test_scales_have_their_own_rate_and_never_decay():
    for config in (StudentConfig(), GDFQ_STUDENT):
        weights, scales = student_optimizer(*_parameters(), config).param_groups
        assert (weights["lr"], scales["lr"]) == (config.lr, config.scale_lr)
        assert scales["weight_decay"] == 0


def test_anneal_is_a_half_cosine_of_the_full_rate():
    optimizer = torch.optim.SGD(_parameters()[0], lr=8.0)
    for fraction, lr in ((0.5, 4.0), (1.0, 0.0), (0.0, 8.0)):
        anneal(optimizer, fraction)
        assert abs(optimizer.param_groups[0]["lr"] - lr) < 1e-9


def test_milestones_divide_by_ten():
    optimizer = torch.optim.SGD(_parameters()[0], lr=1.0)
    for fraction, lr in ((0.0, 1.0), (0.25, 0.1), (0.6, 0.01)):
        anneal(optimizer, fraction, (0.25, 0.5))
        assert abs(optimizer.param_groups[0]["lr"] - lr) < 1e-9


def test_descend_forgets_the_last_gradient():
    (weight,), _ = _parameters()
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for _ in range(2):
        descend(weight.sum(), optimizer)
    assert torch.equal(weight.detach(), torch.zeros(2))

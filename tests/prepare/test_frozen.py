import copy
import pickle

import torch
from torch import nn

from dfq.prepare.frozen import Frozen, evaluating, freeze_batch_norm


def _frozen(kind=nn.BatchNorm2d):
    model = nn.Sequential(kind(4), nn.Dropout())
    freeze_batch_norm(model)
    return model.train()


def test_statistics_never_change_and_affine_parameters_still_train():
    model = _frozen()
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert not norm.training
    assert model[1].training
    before = copy.deepcopy(norm.state_dict())
    model(3 + torch.randn(8, 4, 5, 5)).square().sum().backward()
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name])
    assert norm.weight.grad.abs().min() > 0
    assert norm.bias.grad.abs().min() > 0


def test_copies_stay_frozen():
    model = _frozen()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.train()
        assert not other[0].training
        assert other[0].running_mean is not model[0].running_mean
        x = torch.randn(3, 4, 2, 2)
        assert torch.equal(other[0](x), model[0](x))


def test_every_kind_of_batch_norm_is_frozen_once():
    class Own(nn.BatchNorm1d):
        pass

    for kind in (nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm, Own):
        model = _frozen(kind)
        freeze_batch_norm(model)
        assert isinstance(model[0], kind)
        assert type(model[0]).__mro__.count(Frozen) == 1
        assert not model.train()[0].training


def test_evaluating_restores_every_mode():
    model = nn.Sequential(nn.Dropout(), nn.Dropout(), nn.Dropout()).train()
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model] == [True, False, True]
    assert model.training

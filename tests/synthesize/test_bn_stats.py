import copy

import pytest
import torch
from torch import nn

from dfq.synthesize.bn_stats import capture_bn_statistics
from dfq.synthesize.losses import bn_mismatch
from dfq.types import InputError


def _model():
    body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)]
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return model.eval().requires_grad_(False)


def _inputs_of_batch_norms(model, images):
    seen = []
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images)
    return seen


def test_statistics_and_output_are_those_of_the_plain_model():
    model, images = _model(), torch.randn(7, 3, 12, 12)
    inputs = _inputs_of_batch_norms(copy.deepcopy(model), images)
    with capture_bn_statistics(model) as stats:
        output = model(images)
    torch.testing.assert_close(output, model(images))
    for x, mean, var in zip(inputs, stats.batch_mean, stats.batch_var, strict=True):
        expected_var, expected_mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean, expected_mean, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(var, expected_var, atol=1e-6, rtol=1e-5)
    assert torch.equal(stats.stored_mean[0], model[1].running_mean)


def test_every_forward_starts_anew():
    model = _model()
    with capture_bn_statistics(model) as stats:
        model(torch.randn(2, 3, 12, 12))
        model(torch.randn(2, 3, 12, 12))
        assert len(stats.batch_mean) == len(stats.stored_mean) == 2


def test_model_is_itself_again_even_after_an_error():
    model = _model()
    with pytest.raises(RuntimeError), capture_bn_statistics(model):
        model(torch.randn(2, 1, 12, 12))
    assert not model._forward_pre_hooks
    assert not any("forward" in vars(layer) for layer in model.modules())
    copy.deepcopy(model)


def test_images_get_a_gradient_that_lowers_the_mismatch():
    model, images = _model(), torch.randn(16, 3, 12, 12, requires_grad=True)
    with capture_bn_statistics(model) as stats:
        model(images)
        before = bn_mismatch(stats).sum()
        before.backward()
        with torch.no_grad():
            model(images - 0.05 * images.grad)
    assert bn_mismatch(stats).sum() < before


def test_mismatch_by_hand_for_both_moments():
    layer = nn.BatchNorm2d(1).eval()  # stores mean 0, variance 1
    x = torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)  # mean 3, variance 4
    with capture_bn_statistics(layer) as stats:
        layer(x)
    torch.testing.assert_close(bn_mismatch(stats, "var"), torch.tensor([9.0 + 9.0]))
    torch.testing.assert_close(bn_mismatch(stats, "std"), torch.tensor([9.0 + 1.0]))


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(InputError, match="remembers nothing"), capture_bn_statistics(nn.ReLU()):
        pass


def test_a_training_batch_norm_is_refused_by_name():
    model = _model()
    model[4].train()
    with pytest.raises(InputError, match="layer 4 is in training"), capture_bn_statistics(model):
        pass

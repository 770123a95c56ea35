"""How much each layer matters."""

import pytest
import torch
from torch import nn

from dfq.prepare import calibrate, prepare
from dfq.prepare.quantizer import Quantizer
from dfq.prepare.sensitivity import layer_importance, norm_importance, quantizing_only


def _pair(overrides=None):
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)]
    teacher = nn.Sequential(*body, nn.Flatten(), nn.Linear(6 * 16, 4)).eval()
    teacher.requires_grad_(False)
    student = prepare(teacher, "w8a8", overrides=overrides)
    images = torch.randn(32, 3, 8, 8)
    calibrate(student, images)
    return teacher, student, images


def _importance(kind, overrides=None):
    return layer_importance(*_pair(overrides), kind, rng=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["sensitivity", "hessian", "static", "uniform"])
def test_the_mean_is_one_and_nothing_is_changed(kind):
    teacher, student, images = _pair()
    before = [value.clone() for value in student.state_dict().values()]
    expected = student(images)
    found = layer_importance(teacher, student, images, kind, rng=torch.Generator().manual_seed(0))
    assert list(found) == ["0", "3", "6"]
    assert sum(found.values()) == pytest.approx(3)
    assert min(found.values()) > 0
    assert all(map(torch.equal, before, student.state_dict().values()))
    assert torch.equal(student(images), expected)


def test_the_layer_with_few_bits_is_the_most_sensitive():
    found = _importance("sensitivity", {"3": 2})
    assert found["3"] > 2.5  # of 3 in all


def test_static_is_the_share_of_the_weights():
    sizes = {"0": 6 * 3 * 9, "3": 6 * 6 * 9, "6": 6 * 16 * 4}
    mean = sum(sizes.values()) / 3
    assert _importance("static") == pytest.approx({n: s / mean for n, s in sizes.items()})


def test_the_trace_is_that_of_the_hessian():
    """By the second derivative of the divergence with respect to every weight of the last layer."""
    teacher, student, images = _pair()
    traces = []
    for name in ("0", "3", "6"):
        weight = teacher.get_submodule(name).weight
        wanted = teacher(images).log_softmax(1)

        def divergence(value, name=name, wanted=wanted):
            logits = torch.func.functional_call(teacher, {f"{name}.weight": value}, images)
            kl = nn.functional.kl_div(
                logits.log_softmax(1), wanted, log_target=True, reduction="sum"
            )
            return kl / len(images)

        hessian = torch.autograd.functional.hessian(divergence, weight)
        traces.append(hessian.reshape(weight.numel(), -1).diagonal().mean())
    expected = torch.stack(traces) / torch.stack(traces).mean()
    rng = torch.Generator().manual_seed(0)
    found = layer_importance(teacher, student, images, "hessian", rng=rng)
    torch.testing.assert_close(torch.tensor([*found.values()]), expected, rtol=0.35, atol=0)


def test_one_layer_alone_is_quantized():
    teacher, student, images = _pair({"3": 2})
    with quantizing_only(student, None):
        torch.testing.assert_close(student(images), teacher(images))
    with quantizing_only(student, student[3]):
        assert not student[3].weight_quantizer.bypass
        assert student[0].weight_quantizer.bypass
        assert not torch.allclose(student(images), teacher(images))
    assert not any(m.bypass for m in student.modules() if isinstance(m, Quantizer))


def test_norms_take_the_importance_of_the_layer_before_them():
    teacher, _, images = _pair()
    found = norm_importance(teacher, {"0": 0.5, "3": 2.0, "6": 0.5}, images[:1])
    assert found.tolist() == [0.5, 2.0]
    assert not any(module._forward_hooks for module in teacher.modules())

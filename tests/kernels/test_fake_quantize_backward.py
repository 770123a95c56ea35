"""fake_quantize backward: the composite's gradients, accurate sums, nothing that is not needed."""

import pytest
import torch
from fake_quantize_cases import EVERYTHING, backward

from dfq_kernels import _backend, fake_quantize


def _composite(x, scale, zero_point, quant_min, quant_max):
    """The definition as autograd sees it, with rounding passed straight through."""
    ratio = x / scale
    code = ratio + (ratio.round() - ratio).detach() + zero_point
    return (code.clamp(quant_min, quant_max) - zero_point) * scale


def _assert_gradients_of_the_composite(axis):
    channels = {None: 1, 0: 6, 1: 5}[axis]
    shape = [1, 1, 1] if axis is None else [channels if d == axis else 1 for d in range(3)]
    scale, zero_point = torch.rand(channels) + 0.1, torch.randint(-2, 3, (channels,)).float()
    # away from where float32 and float64 could round or clamp differently
    x = (torch.randint(-14, 15, (6, 5, 50)) + 0.8 * torch.rand(6, 5, 50) - 0.4) * scale.view(shape)
    grad = torch.randn_like(x)
    exact = [t.double().requires_grad_() for t in (x, scale, zero_point)]
    y = _composite(exact[0], exact[1].view(shape), exact[2].view(shape), -8, 7)
    expected = torch.autograd.grad(y, exact, grad.double())
    inputs = [t.requires_grad_() for t in (x, scale, zero_point)]
    actual = torch.autograd.grad(fake_quantize(*inputs, -8, 7, axis=axis), inputs, grad)
    torch.testing.assert_close(actual[0], expected[0].float(), rtol=0, atol=0)
    for ours, theirs in zip(actual[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-4)


AXES = pytest.mark.parametrize("axis", [None, 0, 1], ids=["per-tensor", "axis0", "axis1"])


@AXES
def test_gradients_are_those_of_the_composite(axis, backend):
    _assert_gradients_of_the_composite(axis)


@AXES
def test_the_reference_has_the_gradients_of_the_composite(axis):
    with _backend.use("reference"):
        _assert_gradients_of_the_composite(axis)


def test_sums_are_as_accurate_as_pytorchs(backend):
    """Error against float64, over several draws, at most twice that of ATen."""
    scale, zero_point = torch.tensor([0.11]), torch.tensor([1.0])
    ours = theirs = 0.0
    for _ in range(3 if backend == "triton" else 8):
        x, grad = torch.randn(100_000), torch.randn(100_000)
        args = (grad, x, scale, zero_point, -8, 7)
        exact = [t.double().requires_grad_() for t in (x, scale, zero_point)]
        truth = torch.autograd.grad(_composite(*exact, -8, 7), exact[1], grad.double())[0]
        aten = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward(*args, 1.0)
        ours += (backward(*args, None, 0.0, None, *EVERYTHING)[1] - truth).abs().item()
        theirs += (aten[1] - truth).abs().item()
    assert ours <= 2 * theirs


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str
)
@pytest.mark.parametrize("axis", [None, 1], ids=["per-tensor", "channels_last"])
def test_only_the_needed_gradients(needs, axis, backend):
    x = torch.randn(3, 5, 20, 20).contiguous(memory_format=torch.channels_last)
    channels = 1 if axis is None else 5
    args = (x, torch.rand(channels) + 0.1, torch.zeros(channels), -8, 7, axis, 0.3)
    args = (*args, torch.tensor([5]))
    grad = torch.randn_like(x)
    whole = backward(grad, *args, *EVERYTHING)
    for part, all_, needed in zip(backward(grad, *args, *needs), whole, needs, strict=True):
        assert torch.equal(part, all_) if needed else part.numel() == 0

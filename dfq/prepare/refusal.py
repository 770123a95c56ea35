"""Which layers are quantized, and why another cannot be."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from dfq.prepare.layers import QConv2d, QLinear, QReLU
from dfq.types import InputError

HEAVY = (_ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def is_heavy(module: nn.Module) -> bool:
    """Whether ``module`` multiplies by weights, so that leaving it float would matter."""
    return isinstance(module, HEAVY)


def check_model(model: nn.Module) -> None:
    """Refuse what no rule by layer can handle.

    Raises:
        InputError: if the model is compiled by ``torch.jit``, lazy or prepared already.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("the model is a ScriptModule, whose layers are fixed; pass the original.")
    for name, module in model.named_modules():
        if isinstance(module, QConv2d | QLinear | QReLU):
            raise InputError(f"{name} is quantized already; prepare the float model instead.")
        if any(nn.parameter.is_lazy(p) for p in module.parameters(recurse=False)):
            raise InputError(f"{name} has no weights yet; run one batch through the model first.")


def check_layer(name: str, module: nn.Module) -> None:
    """Refuse a heavy layer that cannot be replaced by a quantized one of the same meaning.

    Raises:
        InputError: naming the layer, the reason and the remedy.
    """
    reason = _reason(module)
    if reason:
        raise InputError(
            f"{name or 'the model'} ({type(module).__name__}) cannot be quantized: {reason}, "
            f"or leave it float with overrides={{{name!r}: None}}."
        )


def _reason(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        return "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations"
    if type(module) not in (nn.Conv2d, nn.Linear):
        return "only nn.Conv2d and nn.Linear themselves have a quantized form; rewrite it as one"
    if any(_hooks(module)):
        return (
            "it has hooks, which its replacement would lose; remove them (weight_norm, "
            "spectral_norm and pruning are such hooks, each with a function that removes it)"
        )
    assert isinstance(module.weight, torch.Tensor)
    if module.weight.dtype not in _FLOATS:
        return f"its weight is {module.weight.dtype}; convert the model with .float()"
    if not module.weight.isfinite().all():
        return "its weight has NaN or infinite values; load a sound checkpoint"
    return None


def _hooks(module: nn.Module) -> tuple[object, ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )

"""Where images enter a network and where its outputs leave: the layers that keep more bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dfq.outputs import tensors
from dfq.prepare.frozen import evaluating
from dfq.types import InputError


def execution_order(model: nn.Module, layers: list[str], shape: tuple[int, ...]) -> list[str]:
    """The layers in the order in which a batch of one zero image reaches them.

    Raises:
        InputError: if the model does not take it.
    """
    order: list[str] = []
    with torch.no_grad():
        _run_with_hooks(model, layers, shape, lambda name, output: order.append(name))
    return order or layers


def output_layers(model: nn.Module, layers: list[str], shape: tuple[int, ...]) -> list[str]:
    """The layers from which some output is reached without another layer between, in their order.

    A detector has one for each of its heads. Found without tracing: each layer's output is cut off
    from what is before it, and those that the outputs still depend on are the ones. None, where
    an output is no tensor or has no gradient.
    """
    cuts: list[tuple[str, Tensor]] = []

    def cut(name: str, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        cuts.append((name, leaf))
        return leaf.clone()  # what follows may work in place

    with torch.enable_grad():
        output = _run_with_hooks(model, layers, shape, cut)
        try:
            ends = [end.sum() for end in tensors(output) if end.requires_grad]
        except TypeError:
            return []
        if not ends:
            return []
        leaves = [leaf for _, leaf in cuts]
        gradients = torch.autograd.grad(sum(ends), leaves, allow_unused=True)  # type: ignore
    return [name for (name, _), g in zip(cuts, gradients, strict=True) if g is not None]


def _run_with_hooks(
    model: nn.Module, layers: list[str], shape: tuple[int, ...], hook: Callable[[str, Tensor], Any]
) -> Any:
    """What the model gives for one zero image, while ``hook`` sees every layer's output."""
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: hook(name, output)
        )
        for name in layers
    ]
    some = next(model.parameters())
    try:
        with evaluating(model):
            return model(torch.zeros(1, *shape, device=some.device, dtype=some.dtype))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(
            f"the model does not run on one image of shape {shape}; give its own ({reason})."
        ) from error
    finally:
        for handle in handles:
            handle.remove()

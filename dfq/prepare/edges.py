"""Where images enter a network and where its outputs leave: the tensors that keep more bits."""

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
        _run_with_hooks(model, layers, shape, lambda name, args, output: order.append(name))
    return order or layers


def second_layers(
    model: nn.Module, layers: list[str], shape: tuple[int, ...], first: str
) -> list[str]:
    """The layers that take in what the layer ``first`` puts out and no other layer does.

    Mostly one; two where a shortcut has a convolution of its own. Found as the output layers are:
    of all layers before, their input depends on the first alone.
    """
    cuts: list[tuple[str, Tensor]] = []
    found: list[str] = []

    def cut(name: str, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if args and args[0].requires_grad and set(_reached(args[0], cuts)) == {first}:
            found.append(name)
        return _cut(cuts, name, output)

    with torch.enable_grad():
        _run_with_hooks(model, layers, shape, cut)
    return list(dict.fromkeys(found))


def output_layers(model: nn.Module, layers: list[str], shape: tuple[int, ...]) -> list[str]:
    """The layers from which some output is reached without another layer between, in their order.

    A detector has one for each of its heads. Found without tracing: each layer's output is cut off
    from what is before it, and those that the outputs still depend on are the ones. None, where
    an output is no tensor or has no gradient.
    """
    cuts: list[tuple[str, Tensor]] = []

    with torch.enable_grad():
        output = _run_with_hooks(model, layers, shape, lambda name, args, o: _cut(cuts, name, o))
        try:
            ends = [end.sum() for end in tensors(output) if end.requires_grad]
        except TypeError:
            return []
        if not ends:
            return []
        return _reached(sum(ends), cuts)  # type: ignore


def _cut(cuts: list[tuple[str, Tensor]], name: str, output: Tensor) -> Tensor:
    """The layer's output, kept in ``cuts`` as a leaf that knows nothing of what is before it."""
    leaf = output.detach().requires_grad_()
    cuts.append((name, leaf))
    return leaf.clone()  # what follows may work in place


def _reached(end: Tensor, cuts: list[tuple[str, Tensor]]) -> list[str]:
    """The layers of ``cuts`` that ``end`` depends on."""
    gradients = torch.autograd.grad(
        end.sum(), [leaf for _, leaf in cuts], allow_unused=True, retain_graph=True
    )
    return [name for (name, _), g in zip(cuts, gradients, strict=True) if g is not None]


def _run_with_hooks(
    model: nn.Module,
    layers: list[str],
    shape: tuple[int, ...],
    hook: Callable[[str, tuple[Any, ...], Tensor], Any],
) -> Any:
    """What the model gives for one zero image; ``hook`` sees what every layer takes and gives."""
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: hook(name, args, output)
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

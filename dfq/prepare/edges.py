"""Where images enter a network and where its outputs leave: the tensors that keep more bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfq.hooks import removing
from dfq.outputs import tensors
from dfq.prepare.frozen import evaluating
from dfq.types import InputError


class Edges(NamedTuple):
    """What one image tells of a model's layers.

    Attributes:
        order: the layers in the order in which it reaches them; one used twice is there twice.
        second: those that take in what the first one puts out and no other layer does. Mostly one;
            two where a shortcut has a convolution of its own.
        outputs: those from which some output is reached without another layer between, in their
            order; a detector has one for each of its heads. None where an output is no tensor or
            has no gradient.
    """

    order: list[str]
    second: list[str]
    outputs: list[str]


def find_edges(model: nn.Module, layers: list[str], shape: tuple[int, ...]) -> Edges:
    """Show the model one image of zeros and look where it passes; ``shape`` is ``[C, H, W]``.

    Found without tracing: each layer's output is cut off from what is before it, so that whatever
    depends on it does so with no other layer between.

    Raises:
        InputError: if the model does not take it.
    """
    cuts: list[tuple[str, Tensor]] = []
    second: list[str] = []

    def cut(name: str, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if args and args[0].requires_grad and set(_reached(args[0], cuts)) == {cuts[0][0]}:
            second.append(name)
        leaf = output.detach().requires_grad_()
        cuts.append((name, leaf))
        return leaf.clone()  # what follows may work in place

    with torch.enable_grad():
        output = _run_with_hooks(model, layers, shape, cut)
        outputs = _reached(_total(output), cuts)
    return Edges([name for name, _ in cuts], list(dict.fromkeys(second)), outputs)


def _total(output: Any) -> Tensor | None:
    """The sum of all outputs that have a gradient, if there are any."""
    try:
        ends = [end.sum() for end in tensors(output) if end.requires_grad]
    except TypeError:
        return None
    return torch.stack(ends).sum() if ends else None


def _reached(end: Tensor | None, cuts: list[tuple[str, Tensor]]) -> list[str]:
    """The layers of ``cuts`` that ``end`` depends on."""
    if end is None:
        return []
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
    hooks = removing(
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: hook(name, args, output)
        )
        for name in layers
    )
    some = next(model.parameters())
    try:
        with hooks, evaluating(model):
            return model(torch.zeros(1, *shape, device=some.device, dtype=some.dtype))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(
            f"the model does not run on one image of shape {shape}; give its own ({reason})."
        ) from error

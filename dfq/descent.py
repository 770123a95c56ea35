"""The few lines that every training loop repeats."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def descend(loss: Tensor, *optimizers: Optimizer) -> None:
    """One step of every optimizer down ``loss``."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


def anneal(optimizer: Optimizer, fraction: float, milestones: tuple[float, ...] = ()) -> None:
    """Set the learning rates for ``fraction`` (0 to 1) of the way.

    A half cosine from the full rate to nothing, or with ``milestones`` a tenth of the rate from
    each of these fractions on. A group's full rate is what it was when ``anneal`` first saw it.
    """
    factor = 0.5 * (1 + math.cos(math.pi * fraction))
    if milestones:
        factor = 0.1 ** sum(fraction >= milestone for milestone in milestones)
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("full_lr", group["lr"]) * factor


@contextmanager
def held_still(model: nn.Module) -> Iterator[None]:
    """Within, gradients pass through ``model`` but none is computed for its parameters."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def seeded_layers(rng: torch.Generator) -> Iterator[None]:
    """Within, new layers start from ``rng``; the global generator, their usual source, is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
        yield

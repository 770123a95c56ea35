"""Swing convolution (GENIE, arXiv:2212.04780): strided convolutions that look where chance says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dfq.hooks import removing


@contextmanager
def swing_convolutions(model: nn.Module, rng: torch.Generator) -> Iterator[None]:
    """Within, every strided ``nn.Conv2d`` of ``model`` sees its input moved by a few pixels.

    A strided convolution reads some pixels more often than others, and images that are optimized
    through it show that as a checkerboard. Moved at random, its grid falls on every pixel alike.

    Each forward draws by how many, up to ``stride - 1`` either way and the same for the whole
    batch; what comes in at the edge is mirrored. The released code moves by up to 1, which is the
    same for the usual stride of 2; the rule for larger strides is ours. A map of one pixel stays.

    Args:
        model: left as it was when the context closes.
        rng: CPU generator; the host must know how far.
    """

    def swing(conv: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        assert isinstance(conv, nn.Conv2d)
        return _moved(args[0], conv.stride, rng), *args[1:]  # type: ignore[arg-type]

    strided = [m for m in model.modules() if isinstance(m, nn.Conv2d) and max(m.stride) > 1]
    with removing(conv.register_forward_pre_hook(swing) for conv in strided):
        yield


def _moved(x: Tensor, stride: tuple[int, int], rng: torch.Generator) -> Tensor:
    """[B, C, H, W] -> the same shape, moved by up to ``stride - 1`` pixels either way."""
    for dim, step in zip((2, 3), stride, strict=True):
        reach = min(step, x.shape[dim]) - 1
        by = int(torch.randint(-reach, reach + 1, (), generator=rng))
        x = shifted(x, by, dim)
    return x


def shifted(x: Tensor, by: int, dim: int) -> Tensor:
    """``x`` moved ``by`` pixels along ``dim``, mirrored at the edge; cheaper than pad and crop."""
    size = x.shape[dim]
    if by == 0:
        return x
    if by > 0:
        mirrored = x.narrow(dim, 1, by).flip(dim)
        return torch.cat((mirrored, x.narrow(dim, 0, size - by)), dim)
    mirrored = x.narrow(dim, size + by - 1, -by).flip(dim)
    return torch.cat((x.narrow(dim, -by, size + by), mirrored), dim)

"""A student whose graph cannot be told, frozen layer by layer: float between, integers within."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dfq.deploy.chains import Chain
from dfq.deploy.fold import fold, grid_of, unfused
from dfq.deploy.operations import OPERATIONS, Place
from dfq.deploy.program import Grid
from dfq.prepare.layers import QConv2d, QLinear


class _PackedLayer(nn.Module):
    """A layer of integers between float tensors; it has no float weights and no gradient.

    Args:
        layer: calibrated.
    """

    op: str

    def __init__(self, layer: Any) -> None:
        super().__init__()
        quantizer = layer.input_quantizer
        self.grid: Grid | None = None if quantizer is None else grid_of(quantizer)
        chain = Chain(layer, None, None)
        folded = fold(chain, self.grid, None, None) if self.grid else unfused(layer)
        self.numbers = folded.numbers
        for name, tensor in folded.tensors.items():
            self.register_buffer(name, tensor.detach())
        self._run: Callable[..., Tensor] | None = None

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """As the quantized layer that it was."""
        if self._run is None:  # weights are laid out for this device once
            self._run = self._bind()
        y = self._run(x)
        return y.contiguous() if x.is_contiguous() else y  # what follows may look at the strides

    def _bind(self) -> Callable[..., Tensor]:
        tensors = dict(self.named_buffers())
        place = Place(self.get_buffer("weight").device)
        if self.grid is None:
            return OPERATIONS[f"float_{self.op}"](self.numbers, tensors, place)
        quantize = OPERATIONS["quantize"]({"grid": self.grid.as_dict()}, {}, place)
        layer = OPERATIONS[self.op](self.numbers, tensors, place)
        return lambda x: layer(quantize(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _PackedLayer:
        self._run = None  # the tensors go to another device
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_run": None}  # a copy lays its weights out itself


class PackedConv2d(_PackedLayer):
    """What ``QConv2d`` computes, on integers: [B, in_channels, H, W], float32 in and out."""

    op = "conv"


class PackedLinear(_PackedLayer):
    """What ``QLinear`` computes, on integers: [..., in_features], float32 in and out."""

    op = "linear"


def freeze_layers(student: nn.Module) -> nn.Module:
    """A copy of ``student`` whose layers run on integers; it is still a model of its own class.

    Raises:
        InputError: if the student has no scales, or a layer has no integer kernel.
    """
    packed = copy.deepcopy(student).eval().requires_grad_(False)
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(packed.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, QConv2d | QLinear):
                kind = PackedConv2d if isinstance(child, QConv2d) else PackedLinear
                setattr(parent, name, made.setdefault(child, kind(child)))
    return packed

"""Channels whose sizes are free to choose, found in any graph by sending their names through it.

What a BatchNorm puts out may have any size, channel by channel, as long as all layers that take the
channel in take the size back with their weights (Nagel et al., DFQ, arXiv:1906.04721). Which layers
those are, behind concatenations, shuffles and additions, the graph itself tells if it runs on
numbers that name channels, in the place of activations: whatever moves channels moves their names,
an addition makes two names one, and what is not positively homogeneous fixes a channel's size.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfq.prepare.adds import ADDS, RELUS, QAdd
from dfq.prepare.frozen import Frozen, evaluating
from dfq.prepare.layers import QConv2d, QLinear, QReLU
from dfq.prepare.trace import trace
from dfq.types import QuantSpec

FIXED = 0  # the name of all channels whose size stays

# of each channel by itself, and positively homogeneous
_KEEPING_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.AdaptiveAvgPool2d, nn.Upsample, nn.Identity, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d),
)
_KEEPING = (
    *RELUS,
    *(F.leaky_relu, F.max_pool2d, torch.max_pool2d, F.adaptive_max_pool2d, F.avg_pool2d),
    *(F.adaptive_avg_pool2d, F.interpolate, F.dropout, torch.dropout, F.dropout2d),
    *("contiguous", "clone"),
)
_MOVING_MODULES = (nn.Flatten, nn.ChannelShuffle)
_MOVING = (
    *(torch.cat, torch.stack, operator.getitem, getattr, "size", torch.channel_shuffle),
    *(torch.chunk, "chunk", torch.split, "split", torch.unbind, "unbind", torch.narrow, "narrow"),
    *(torch.flatten, "flatten", torch.reshape, "reshape", "view", torch.squeeze, "squeeze"),
    *(torch.permute, "permute", torch.transpose, "transpose", torch.unsqueeze, "unsqueeze"),
)
_AVERAGING = (torch.mean, "mean")
_SPACE = {2, 3, -1, -2}


class Reader(NamedTuple):
    """A layer that takes channels in.

    Attributes:
        layer: used once.
        spec: the grid of its input; None if that stays float.
        names: [C], of its input.
    """

    layer: QConv2d | QLinear
    spec: QuantSpec | None
    names: Tensor


class Channels(NamedTuple):
    """Of a student.

    Attributes:
        total: how many names there are, with that of the fixed ones.
        norms: the BatchNorms whose channels are not all fixed, and the names of each, [C].
        readers: all layers that take some of them in.
    """

    total: int
    norms: list[tuple[nn.BatchNorm2d, Tensor]]
    readers: list[Reader]

    @torch.no_grad()
    def scale(self, sizes: Tensor) -> None:
        """Divide every channel by the size of its name, [total], and take that back behind it."""
        for norm, names in self.norms:
            norm.weight.div_(sizes[names])
            norm.bias.div_(sizes[names])
        for layer, _, names in self.readers:
            weight, groups = layer.weight, getattr(layer, "groups", 1)
            each = sizes[names].reshape(groups, 1, -1).expand(-1, len(weight) // groups, -1)
            weight.mul_(each.reshape(len(weight), -1, *[1] * (weight.ndim - 2)))


def find_channels(student: nn.Module, images: Tensor) -> Channels:
    """What a prepared ``student`` leaves free; nothing where its graph cannot be told.

    Args:
        student: from ``prepare``.
        images: [B, C, H, W]; their shape alone counts.
    """
    graph = trace(student)
    if graph is None:
        return Channels(1, [], [])
    names = _Names(student, graph, images.dtype)
    try:
        with torch.no_grad(), evaluating(student):
            names.run(images)
    except Exception:  # what is foreign may not take zeros, or names
        return Channels(1, [], [])
    return names.found()


class _Names(fx.Interpreter):
    """Every tensor is one of names, float64: a channel's name stands wherever the channel does."""

    def __init__(self, student: nn.Module, graph: fx.Graph, dtype: torch.dtype) -> None:
        super().__init__(student, graph=graph)
        self.dtype = dtype
        self.calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
        self.parents = [FIXED]  # of each name, one that means the same; itself for most
        self.norms: list[tuple[nn.BatchNorm2d, Tensor]] = []
        self.readers: list[Reader] = []
        self.grids: dict[int, QuantSpec] = {}  # on which a QReLU has put a name's channels

    def found(self) -> Channels:
        """What the run has told."""
        roots = torch.tensor([self.root(name) for name in range(len(self.parents))])
        read = torch.cat([roots[FIXED:1], *(roots[reader.names] for reader in self.readers)])
        roots[~torch.isin(roots, read)] = FIXED  # nobody hears of it
        kept, places = roots.unique(return_inverse=True)
        norms = [(norm, places[names]) for norm, names in self.norms]
        readers = [reader._replace(names=places[reader.names]) for reader in self.readers]
        return Channels(
            len(kept),
            [(norm, names) for norm, names in norms if names.any()],
            [reader for reader in readers if reader.names.any()],
        )

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An image has the size it has."""
        return _fixed(super().placeholder(target, args, kwargs), torch.float64)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """So does a constant."""
        return _fixed(super().get_attr(target, args, kwargs), torch.float64)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        """So must what is put out."""
        self.fix(args)
        return args[0]

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A layer, or what is between layers."""
        module, once = self.fetch_attr(target), self.calls[target] == 1
        if isinstance(module, nn.BatchNorm2d) and isinstance(module, Frozen):
            return self.baptize(module, args[0], once)
        if isinstance(module, QConv2d | QLinear):
            return self.read(module, args[0], once)
        if isinstance(module, QAdd):
            return self.join(*args)
        if isinstance(module, QReLU) and module.maximum is None:
            self.grids |= dict.fromkeys(self.each(args[0]).tolist(), module.quantizer.spec)
            return args[0]
        if isinstance(module, _KEEPING_MODULES):
            return self.keep(module, args, kwargs)
        if isinstance(module, _MOVING_MODULES):
            return module(*args, **kwargs)
        return self.unknown(module, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A function of tensors, or of their shapes."""
        return self.call(target, target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A method of the first of ``args``."""

        def method(x: Any, *rest: Any, **named: Any) -> Any:
            return getattr(x, target)(*rest, **named)

        return self.call(target, method, args, kwargs)

    def call(self, target: Any, function: Any, args: Any, kwargs: Any) -> Any:
        """By what is known of ``target``."""
        tensors = [isinstance(arg, Tensor) for arg in args]
        if target in ADDS and tensors == [True, True] and not kwargs:
            return self.join(*args)
        if target in _KEEPING or (target in _AVERAGING and _over_space(*args, **kwargs)):
            return self.keep(function, args, kwargs)
        if target is F.pad and _with_zeros(*args, **kwargs):
            return self.pad(args, kwargs)
        if target in _MOVING:
            return function(*args, **kwargs)
        return self.unknown(function, args, kwargs)

    def baptize(self, norm: Any, x: Tensor, once: bool) -> Tensor:
        """The channels of a BatchNorm get new names."""
        self.fix(x)
        if not (once and norm.affine):
            return torch.zeros_like(x)
        names = torch.arange(len(self.parents), len(self.parents) + x.shape[1])
        self.parents += names.tolist()
        self.norms.append((norm, names))
        return _spread(names, x)

    def read(self, layer: QConv2d | QLinear, x: Tensor, once: bool) -> Tensor:
        """A layer ends the way of what it takes in."""
        zeros = _fixed(x, self.dtype)
        if isinstance(layer, QConv2d):
            y = layer._conv_forward(zeros, layer.weight, None)
        else:
            y = F.linear(zeros, layer.weight)
        if once and x.ndim == layer.weight.ndim:
            names, quantizer = self.each(x), layer.input_quantizer
            spec = quantizer.spec if quantizer else self.grids.get(int(names[0]))
            self.readers.append(Reader(layer, spec, names))
        else:
            self.fix(x)
        return _fixed(y, torch.float64)

    def keep(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What comes out has the names that went in, or it is not known."""
        x, y = args[0], function(*args, **kwargs)
        if isinstance(y, Tensor) and y.ndim > 1 and y.shape[:2] == x.shape[:2]:
            return _spread(self.each(x), y)
        return self.unknown(function, args, kwargs)

    def pad(self, args: Any, kwargs: Any) -> Any:
        """With zeros: around each channel, or with further channels, which are fixed."""
        y = F.pad(*args, **kwargs)
        same = y.ndim > 1 and y.shape[:2] == args[0].shape[:2]
        return _spread(self.each(args[0]), y) if same else y

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """Channels that are added have one size."""
        if x.shape != y.shape or x.ndim < 2:
            self.fix((x, y))
            return x.new_zeros(torch.broadcast_shapes(x.shape, y.shape))
        for first, second in zip(self.each(x).tolist(), self.each(y).tolist(), strict=True):
            self.unite(first, second)
        return _spread(self.each(x), x)

    def unknown(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """It is run on zeros, in case that it works in place."""
        self.fix((args, kwargs))
        y = function(*_fixed(args, self.dtype), **_fixed(kwargs, self.dtype))
        return _fixed(y, torch.float64)

    def each(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the name of each channel, [C]; what holds several is fixed."""
        low, high = x.transpose(0, 1).flatten(1).aminmax(dim=1)
        self.fix(x[:, low != high])
        return low.where(low == high, FIXED).long().cpu()

    def fix(self, value: Any) -> None:
        """The size of all channels in it."""
        if isinstance(value, Tensor):
            for name in value.unique().tolist():
                self.unite(FIXED, int(name))
        elif isinstance(value, dict):
            self.fix(tuple(value.values()))
        elif isinstance(value, tuple | list):
            for part in value:
                self.fix(part)

    def unite(self, first: int, second: int) -> None:
        """Two names mean the same from now on."""
        low, high = sorted((self.root(first), self.root(second)))
        self.parents[high] = low

    def root(self, name: int) -> int:
        """The smallest that means the same."""
        while self.parents[name] != name:
            name = self.parents[name]
        return name


def _fixed(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with zeros in the place of every number of a floating-point tensor."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.zeros_like(value, dtype=dtype)
    if isinstance(value, dict):
        return {key: _fixed(part, dtype) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_fixed(part, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _spread(names: Tensor, like: Tensor) -> Tensor:
    """[C] -> [B, C, ...], of the shape of ``like``."""
    column = names.to(like).reshape(1, -1, *[1] * (like.ndim - 2))
    return column.expand(like.shape).clone()


def _with_zeros(x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> bool:
    """Whether ``F.pad`` pads so; its arguments."""
    return mode == "constant" and not value


def _over_space(x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> bool:
    """Whether a mean is one over places of an image alone."""
    dims = {dim} if isinstance(dim, int) else set(dim or ())
    return bool(dims) and dims <= _SPACE and isinstance(x, Tensor) and x.ndim == 4 and not kwargs

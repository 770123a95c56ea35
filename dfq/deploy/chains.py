"""Which layers of a traced student become one step: a convolution and what alone follows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from dfq.prepare.adds import QAdd, is_relu, on_grid
from dfq.prepare.frozen import Frozen
from dfq.prepare.layers import QConv2d, QLinear, QReLU

Modules = Mapping[str, nn.Module]


@dataclass
class Chain:
    """A layer, and in this order, where there is one: BatchNorm, ReLU or QReLU, QAdd.

    If its input is not ``integer``, as that of the first layer in protocol gdfq, it is alone.
    """

    layer: Any  # QConv2d or QLinear
    source: Any  # node of its input
    end: Any  # node whose value the step computes
    integer: bool = True
    norm: Any = None
    relu: bool = False
    ceiling: float | None = None  # of ReLU6
    grid: Any = None  # quantizer of a QReLU or QAdd at the end
    add: QAdd | None = None
    carried: fx.Node | None = None


def module_of(node: Any, modules: Modules) -> nn.Module | None:
    """The module that a node calls."""
    is_call = isinstance(node, fx.Node) and node.op == "call_module"
    return modules[str(node.target)] if is_call else None


def find_chains(graph: fx.Graph, modules: Modules) -> tuple[dict[fx.Node, Chain], set[fx.Node]]:
    """The chains by their last node, and the nodes before it that no longer count."""
    chains, inner = {}, set()
    for node in graph.nodes:
        layer = module_of(node, modules)
        if isinstance(layer, QConv2d | QLinear):
            chain = Chain(layer, node.args[0], node)
            chain.integer = layer.input_quantizer is not None or on_grid(chain.source, modules)
            while chain.integer and _extend(chain, modules):
                pass
            chains[chain.end] = chain
            inner |= _nodes_between(node, chain.end)
    return chains, inner


def _extend(chain: Chain, modules: Modules) -> bool:
    """Take in the next node, if it is the only reader and fits."""
    if len(chain.end.users) != 1 or chain.grid is not None or chain.ceiling is not None:
        return False
    follower = next(iter(chain.end.users))
    module = module_of(follower, modules)
    if isinstance(module, Frozen) and chain.norm is None and not chain.relu:
        if module.get_buffer("running_mean") is None:
            return False
        chain.norm, chain.relu = module, module.rectifies
    elif isinstance(module, QReLU):
        chain.relu, chain.ceiling, chain.grid = True, module.maximum, module.quantizer
    elif isinstance(module, QAdd) and follower.args[1] is chain.end and not chain.relu:
        carried = follower.args[0]
        assert isinstance(carried, fx.Node)
        chain.add, chain.carried = module, carried
        chain.relu, chain.grid = module.relu, module.quantizer
    elif is_relu(follower, modules):
        chain.relu = True
    elif isinstance(module, nn.ReLU6):
        chain.relu, chain.ceiling = True, 6.0
    else:
        return False
    chain.end = follower
    return True


def _nodes_between(first: fx.Node, last: fx.Node) -> set[fx.Node]:
    found, node = set(), first
    while node is not last:
        found.add(node)
        node = next(iter(node.users))
    return found

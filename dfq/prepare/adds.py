"""Residual additions on grids of their own, so that integers can run through a whole network."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfq.prepare.frozen import Frozen
from dfq.prepare.layers import QConv2d, QReLU, per_tensor_quantizer
from dfq.prepare.trace import trace
from dfq.types import QuantSpec

ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_KEEP_GRID = (operator.getitem, F.pad, F.max_pool2d, torch.flatten, "flatten", *RELUS)
_KEEP_GRID_MODULES = (nn.Identity, nn.MaxPool2d, nn.Flatten, nn.ReLU, nn.ZeroPad2d)


class QAdd(nn.Module):
    """``carried + computed``, the carried branch and the sum fake-quantized.

    Args:
        spec: grid of the sum, per tensor.
        carried_spec: grid of the carried branch; None if what comes is on a grid already.
        relu: whether a ReLU lies between the sum and its grid.
        scales: "learned" (LSQ) or "minmax" (moving average).
        device: of the scales.
    """

    def __init__(
        self,
        spec: QuantSpec,
        carried_spec: QuantSpec | None = None,
        *,
        relu: bool = False,
        scales: str = "learned",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.relu = relu
        self.quantizer = per_tensor_quantizer(spec, scales, device)
        self.carried_quantizer = (
            None if carried_spec is None else per_tensor_quantizer(carried_spec, scales, device)
        )

    def forward(self, carried: Tensor, computed: Tensor) -> Tensor:
        """Two tensors of one shape -> their sum."""
        if self.carried_quantizer is not None:
            carried = self.carried_quantizer(carried)
        total = carried + computed
        return self.quantizer(F.relu_(total) if self.relu else total)

    def extra_repr(self) -> str:
        """``relu`` where there is one."""
        return "relu" if self.relu else ""


def quantize_adds(student: nn.Module, spec: QuantSpec, *, scales: str = "learned") -> nn.Module:
    """``student`` with its additions of two activations replaced by ``QAdd``.

    They are found in the graph, which then takes the place of the model's own forward; the names in
    the state_dict stay. A ReLU that alone uses the sum becomes part of it. The computed branch is
    the later one that comes straight from a layer: a kernel can add the other to it. A model
    without additions, or whose graph cannot be told, is returned as it is.

    Args:
        student: with its layers replaced already.
        spec: grid of the sums, and of carried branches that are on none.
        scales: "learned" or "minmax".
    """
    graph = trace(student)
    adds = [node for node in graph.nodes if _is_add(node)] if graph else []
    if not graph or not adds:
        return student
    device = next(student.parameters()).device
    for node in adds:
        modules = dict(student.named_modules())
        carried, computed = _branches(node, modules)
        relu = [user for user in node.users if len(node.users) == 1 and is_relu(user, modules)]
        carried_spec = None if on_grid(carried, modules) else spec
        add = QAdd(spec, carried_spec, relu=bool(relu), scales=scales, device=device)
        name = _free_name(node, modules)
        owner, _, last = name.rpartition(".")
        student.get_submodule(owner).add_module(last, add)
        with graph.inserting_after(node):
            call = graph.call_module(name, (carried, computed))
        for old in (*relu, node):
            old.replace_all_uses_with(call)
            graph.erase_node(old)
    return fx.GraphModule(student, graph, type(student).__name__)


def _is_add(node: fx.Node) -> bool:
    two = len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)
    return two and not node.kwargs and calls(node, ADDS)


def calls(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    """Whether it calls one of these functions or methods; a module may bear the same name."""
    return node.op in ("call_function", "call_method") and node.target in targets


def is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether it is a ReLU, of a module, a function or a method."""
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.ReLU)
    return calls(node, RELUS)


def _branches(node: fx.Node, modules: dict[str, nn.Module]) -> list[Any]:
    """The carried and the computed branch of an addition."""
    order = {other: index for index, other in enumerate(node.graph.nodes)}

    def computed(branch: fx.Node) -> bool:
        module = modules.get(str(branch.target)) if branch.op == "call_module" else None
        return isinstance(module, Frozen | QConv2d) and len(branch.users) == 1

    return sorted(node.args, key=lambda branch: (computed(branch), order[branch]))


def on_grid(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether all values of a tensor lie on the grid of one ``QAdd`` or ``QReLU``."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, QAdd | QReLU):
        return True
    keeps = isinstance(module, _KEEP_GRID_MODULES) or calls(node, _KEEP_GRID)
    return keeps and isinstance(node.args[0], fx.Node) and on_grid(node.args[0], modules)


def _free_name(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """A name below the module in whose forward the addition stands."""
    owners = node.meta.get("nn_module_stack") or {}
    owner = next(reversed([path for path, *_ in owners.values()]), "")
    base = f"{owner}.add" if owner else "add"
    return next(n for n in (base, *(f"{base}{i}" for i in range(2, 10_000))) if n not in modules)

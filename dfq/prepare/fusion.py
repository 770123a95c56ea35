"""ReLUs that become part of the BatchNorm before them: one pass over memory instead of two."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from dfq.prepare.frozen import Frozen, evaluating
from dfq.prepare.layers import QConv2d, QLinear, QReLU


class FusedReLU(nn.ReLU):
    """``nn.ReLU`` that lets through what a BatchNorm has rectified; it may serve others too."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return x if getattr(x, "rectified", False) else super().forward(x)


def fuse_relus(student: nn.Module) -> None:
    """Let each BatchNorm whose output goes to a ReLU module, and nowhere else, apply it.

    Where outputs go is read off the traced graph, in training and in eval mode. A model that
    cannot be traced stays as it is, which costs time and nothing else.
    """
    found = [_norms_before_relus(student, training) for training in (True, False)]
    for name in found[0] & found[1]:
        student.get_submodule(name).rectifies = True  # type: ignore[assignment]
    for module in student.modules():
        if type(module) is nn.ReLU:
            module.__class__ = FusedReLU


def _norms_before_relus(student: nn.Module, training: bool) -> set[str]:
    """Names of the BatchNorms every call of which feeds one ReLU module alone."""
    with evaluating(student):
        student.train(training)
        try:
            graph = _Tracer().trace(student)
        except Exception:  # a foreign forward may do anything that a tracer cannot follow
            return set()
    modules = dict(student.named_modules())
    feeds: dict[Any, list[bool]] = {}
    for node in graph.nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(norm, Frozen) and norm.fuses:
            users = [modules.get(user.target) for user in node.users if user.op == "call_module"]
            alone = len(node.users) == len(users) == 1
            feeds.setdefault(node.target, []).append(alone and _is_relu(users[0]))
    return {name for name, each in feeds.items() if all(each)}


def _is_relu(module: nn.Module | None) -> bool:
    return type(module) is nn.ReLU or (isinstance(module, QReLU) and module.maximum is None)


class _Tracer(fx.Tracer):
    """Goes into containers, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, Frozen | QConv2d | QLinear | QReLU)
        return ours or super().is_leaf_module(m, module_qualified_name)

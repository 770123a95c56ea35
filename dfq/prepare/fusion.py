"""ReLUs that become part of the BatchNorm before them: one pass over memory instead of two."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dfq.prepare.frozen import Frozen
from dfq.prepare.layers import QReLU
from dfq.prepare.trace import trace


class FusedReLU(nn.ReLU):
    """``nn.ReLU`` that lets through what a BatchNorm has rectified; it may serve others too."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same shape."""
        return x if getattr(x, "rectified", False) else super().forward(x)


def fuse_relus(student: nn.Module) -> None:
    """Let each BatchNorm whose output goes to a ReLU module, and nowhere else, apply it.

    A model whose graph cannot be told stays as it is, which costs time and nothing else.
    """
    for name in _norms_before_relus(student):
        student.get_submodule(name).rectifies = True  # type: ignore[assignment]
    for module in student.modules():
        if type(module) is nn.ReLU:
            module.__class__ = FusedReLU


def _norms_before_relus(student: nn.Module) -> list[str]:
    """Names of the BatchNorms every call of which feeds one ReLU module alone."""
    graph = trace(student)
    modules = dict(student.named_modules())
    feeds: dict[Any, list[bool]] = {}
    for node in graph.nodes if graph else ():
        norm = modules.get(node.target) if node.op == "call_module" else None
        if isinstance(norm, Frozen) and norm.fuses:
            users = [modules.get(user.target) for user in node.users if user.op == "call_module"]
            alone = len(node.users) == len(users) == 1
            feeds.setdefault(node.target, []).append(alone and _is_relu(users[0]))
    return [name for name, each in feeds.items() if all(each)]


def _is_relu(module: nn.Module | None) -> bool:
    return type(module) is nn.ReLU or (isinstance(module, QReLU) and module.maximum is None)

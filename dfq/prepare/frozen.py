"""BatchNorm that keeps its running statistics, whatever ``train()`` says."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfq_kernels import batch_norm

_OUR_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)  # not one that a subclass wrote


class Frozen:
    """Put before a BatchNorm's class, it keeps the module in eval mode; parameters still train.

    It normalizes by ``dfq_kernels.batch_norm``. If it ``rectifies``, the ReLU that follows is part
    of that pass, and the output is marked ``rectified`` so that the ReLU itself lets it through.
    """

    rectifies = False

    @property
    def fuses(self) -> bool:
        """Whether the op does what this module does."""
        norm: Any = self
        known = type(self).__mro__[2].forward in _OUR_FORWARDS  # type: ignore[attr-defined]
        return known and norm.running_mean is not None and norm.running_mean.dtype == torch.float32

    def train(self, mode: bool = True) -> Any:
        """Stay in eval mode."""
        return super().train(False)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        norm: Any = self
        if not self.fuses:
            return super().forward(x)  # type: ignore[misc]
        norm._check_input_dim(x)
        stored = norm.running_mean, norm.running_var
        rectifies = self.rectifies and not torch.compiler.is_compiling()  # it knows no marks
        y, _, _ = batch_norm(x, *stored, norm.weight, norm.bias, norm.eps, rectifies)
        if rectifies:
            y.rectified = True  # type: ignore[attr-defined]
        return y

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self).__mro__[2],), self.__dict__


def freeze_batch_norm(model: nn.Module) -> None:
    """Turn every BatchNorm of ``model``, in place, into a ``Frozen`` one of the same class.

    The model was trained with these statistics and the images are synthetic: a student whose
    statistics follow them is lost (GDFQ, arXiv:2003.03603, fine-tunes with them fixed).
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, Frozen):
            module.__class__ = _frozen(type(module))  # type: ignore[assignment, arg-type]
            module.eval()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, every module of ``model`` is in eval mode; then each is as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@functools.cache
def _frozen(kind: Any) -> type[nn.Module]:
    return type(f"Frozen{kind.__name__}", (Frozen, kind), {})


def _rebuild(kind: Any) -> nn.Module:
    cls = _frozen(kind)
    return cls.__new__(cls)

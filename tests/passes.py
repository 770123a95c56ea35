"""Which ops walk over a large tensor."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FREE = ("detach", "view_as", "view", "as_strided", "alias", "t", "_unsafe_view", "expand")


class Passes(TorchDispatchMode):
    """Names of the ops that read or write at least ``numel`` elements of a tensor, in order."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names, self.calls = numel, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        tensors = [t for t in tree_leaves((args, result)) if isinstance(t, torch.Tensor)]
        if name not in FREE and any(t.numel() >= self.numel for t in tensors):
            self.names.append(name)
            self.calls.append((name, args))
        return result

"""What is hooked is left as it was, however it ends."""

import pytest
from torch import nn

from dfq.hooks import removing


def _hooks(*modules):
    return [len(module._forward_hooks) for module in modules]


def _hook(module):
    return module.register_forward_hook(lambda *_: None)


def test_hooks_are_set_within_and_gone_behind():
    first, second = nn.Identity(), nn.Identity()
    _hook(second)  # not ours: stays

    with removing(_hook(module) for module in (first, second)):
        assert _hooks(first, second) == [1, 2]

    assert _hooks(first, second) == [0, 1]


def test_hooks_are_gone_if_what_runs_fails():
    module = nn.Identity()

    with pytest.raises(ZeroDivisionError), removing([_hook(module), _hook(module)]):
        raise ZeroDivisionError

    assert _hooks(module) == [0]


def test_hooks_are_gone_if_a_later_one_cannot_be_set():
    module = nn.Identity()
    modules = (module, None)

    with pytest.raises(AttributeError), removing(_hook(m) for m in modules):
        pass

    assert _hooks(module) == [0]

"""Hooks that are gone when they have served."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Within, the hooks of these ``handles`` are set; behind it, and if one fails, none is."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield

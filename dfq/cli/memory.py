"""What the command tells the system's allocator."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation; elsewhere do nothing.

    A training step frees and allocates the same activations again. By default large ones go back
    to the system and come anew, page by page: a tenth of the time of a step of ResNet-20. Only a
    program may decide this, not a library, so only the command does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 2**30)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)

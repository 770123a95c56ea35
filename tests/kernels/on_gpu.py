"""What the tests on a GPU share: every backend there, against the reference on the CPU.

``DFQ_DRY_RUN=1`` runs the same lines on the CPU (Triton in its interpreter), where there is no GPU:
bench/gpu_day.py does so in its dry run.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dfq_kernels import _backend

CUDA = torch.cuda.is_available()
DRY_RUN = not CUDA and os.environ.get("DFQ_DRY_RUN") == "1"
DEVICE = "cuda" if CUDA else "cpu"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and not DRY_RUN, reason="torch finds no CUDA device"),
]

SMALL = [(1, 1, 1, 1), (2, 5, 7, 3), (3, 33, 2, 2), (2, 10, 9, 9)]
SHAPES = [(2, 3, 5, 2)] if DRY_RUN else [*SMALL, (4, 130, 31, 1), (16, 64, 30, 31), (0, 3, 2, 2)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "of more channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "expanded": lambda x: x[:1].expand(x.shape),
}

backends = pytest.mark.parametrize("backend", ["compiled", "triton"])
FEW = slice(2 if DRY_RUN else None)  # the interpreter is slow
dtypes = pytest.mark.parametrize("dtype", list(DTYPES.values())[FEW], ids=list(DTYPES)[FEW])
layouts = pytest.mark.parametrize("layout", list(LAYOUTS)[FEW])


def variant(op: str, backend: str) -> Callable[..., Any]:
    """``op`` by ``backend`` on the device; skips the test if it is not in this install."""
    function = _backend.variant(op, backend, DEVICE)
    if function is None:
        pytest.skip(f"{backend} has no {op} for {DEVICE} in this install")
    return function


@contextmanager
def use(backend: str, *ops: str) -> Iterator[None]:
    """Public functions take ``backend``; skips the test if it lacks one of ``ops``."""
    for op in ops:
        variant(op, backend)
    with _backend.use(backend):
        yield


def reference(op: str, *args: Any) -> Any:
    """The definition, on the CPU."""
    return _backend.variant(op, "reference", "cpu")(*args)


def to_device(*values: Any) -> list[Any]:
    """Tensors on the device, with their strides if they are dense; anything else as it is."""
    return [value.to(DEVICE) if isinstance(value, Tensor) else value for value in values]


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, but for the sign of zero and what a NaN holds."""
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=0, equal_nan=True)

"""Every kernel is launched here: on the device of its tensors, with each operation rounded once."""

from typing import Any

import torch
from torch import Tensor


def launch(kernel: Any, programs: int, on: Tensor, *args: Any, **constants: Any) -> None:
    """``programs`` instances of ``kernel`` on the device of ``on``."""
    with torch.cuda.device_of(on):  # nothing on a CPU
        kernel[(programs,)](*args, **constants, enable_fp_fusion=False)

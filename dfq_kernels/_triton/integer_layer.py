"""Runs an integer layer by the kernel that its plan names."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from dfq_kernels._triton.integer_border import border_table
from dfq_kernels._triton.integer_descriptors import run_descriptors
from dfq_kernels._triton.integer_epilogue import epilogue_arguments, neighbors
from dfq_kernels._triton.integer_plan import Kind, Layer, architecture, plan
from dfq_kernels._triton.integer_pointers import run_pointers
from dfq_kernels._triton.qconv2d_stem import run_stem

ASSEMBLER = not os.environ.get("TRITON_INTERPRET")  # which knows none


def run_layer(
    layer: Layer,
    operands: tuple[Tensor, Tensor, Tensor | None],
    x_zero: int,
    y: Tensor,
    rest: tuple[Any, ...],
) -> None:
    """Fill ``y``. ``operands``: x, weight and its zero; ``rest``: the ops' last arguments."""
    if y.numel() == 0:
        return
    x, weight, weight_zero = *operands[:2], neighbors(operands[2])
    residual, grid = rest[2], rest[-1]
    border = x_zero != 0 and layer.padded
    kind = Kind(
        w4=weight.dtype == torch.uint8,
        x4=x.dtype == torch.uint8,
        heavy=weight_zero is not None or (border and (residual is not None or not grid)),
        aligned=x.data_ptr() % 16 == 0 == weight.data_ptr() % 16,
    )
    chosen = plan(layer, kind, architecture(x))
    tensors = (x, weight, weight_zero, border_table(layer, weight, weight_zero, x_zero))
    epilogue = epilogue_arguments(y, rest)
    runs = {"descriptors": run_descriptors, "stem": run_stem, "pointers": run_pointers}
    runs[chosen.kernel](layer, chosen.tile, tensors, epilogue, ASSEMBLER)

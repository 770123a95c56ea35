"""What the steps of a program do. A file names them; it cannot bring its own.

An operation gets what is known when a model is loaded, the numbers and tensors of its step and
where it will run, and returns the function that runs on every batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dfq.deploy.program import Grid, Step
from dfq.types import InputError
from dfq_kernels import (
    Epilogue,
    Int8Grid,
    IntegerWeight,
    Residual,
    Window,
    dequantize,
    prepack,
    qconv2d,
    qlinear,
    quantize,
    requantize,
)

Numbers = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Run = Callable[..., Any]


@dataclass(frozen=True)
class Place:
    """Where a model will run.

    Attributes:
        device: of its tensors.
        prepacked: whether weights are laid out for the CPU's kernels beforehand, beside themselves.
    """

    device: torch.device
    prepacked: bool = True


FLOAT: dict[
    str, Run
] = {  # what a student may do between its quantized layers; by the name that a file has
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d,
    "add": operator.add,
    "avg_pool2d": F.avg_pool2d,
    "batch_norm": F.batch_norm,
    "cat": torch.cat,
    "conv2d": F.conv2d,
    "flatten": torch.flatten,
    "getitem": operator.getitem,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "interpolate": F.interpolate,
    "leaky_relu": F.leaky_relu,
    "linear": F.linear,
    "max_pool2d": F.max_pool2d,
    "mean": torch.mean,
    "mul": operator.mul,
    "pad": F.pad,
    "relu": F.relu,
    "relu6": F.relu6,
    "reshape": torch.reshape,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softmax": F.softmax,
    "tanh": torch.tanh,
}


def _quantize(n: Numbers, t: Tensors, at: Place) -> Run:
    grid = Grid.of(n["grid"])
    scale, zero_point = grid.tensors(at.device)
    bounds = grid.quant_min, grid.quant_max, grid.offset
    return lambda x: quantize(x, scale, zero_point, *bounds)


def _dequantize(n: Numbers, t: Tensors, at: Place) -> Run:
    grid = Grid.of(n["grid"])
    scale, zero_point = grid.tensors(at.device)
    return lambda codes: dequantize(codes, scale, zero_point, grid.offset)


def _requantize(n: Numbers, t: Tensors, at: Place) -> Run:
    before, after = Grid.of(n["from"]), Grid.of(n["grid"])
    ratio, grid = (before.scale, after.scale), Int8Grid(after.zero, after.low, after.high)
    return lambda codes: requantize(codes, ratio, before.zero, grid)


def _conv(n: Numbers, t: Tensors, at: Place) -> Run:
    stride, padding, dilation = (tuple(n[name]) for name in ("stride", "padding", "dilation"))
    window = Window(stride, padding, dilation, n["groups"])
    weight, finish, zero = _weight(n, t), _epilogue(n, t), int(n["zero"])
    if at.prepacked:
        weight = prepack(weight, groups=window.groups, dilation=window.dilation[1])
    return lambda x, *carried: qconv2d(x, weight, finish(*carried), window, x_zero=zero)


def _linear(n: Numbers, t: Tensors, at: Place) -> Run:
    weight, finish, zero = _weight(n, t), _epilogue(n, t), int(n["zero"])
    if at.prepacked:
        weight = prepack(weight)
    return lambda x, *carried: qlinear(x.contiguous(), weight, finish(*carried), x_zero=zero)


def _float_conv(n: Numbers, t: Tensors, at: Place) -> Run:
    """Of a layer whose input is float: its weights as the student has them."""
    weight = (_weight(n, t).integers().float() * t["scale"].view(-1, 1, 1, 1)).permute(0, 3, 1, 2)
    geometry = n["stride"], n["padding"], n["dilation"], n["groups"]
    return lambda x: F.conv2d(x, weight, t.get("bias"), *geometry)


def _float_linear(n: Numbers, t: Tensors, at: Place) -> Run:
    weight = _weight(n, t).integers().float() * t["scale"].view(-1, 1)
    return lambda x: F.linear(x, weight, t.get("bias"))


def _weight(n: Numbers, t: Tensors) -> IntegerWeight:
    return IntegerWeight(t["weight"], tuple(n["shape"]), t.get("weight_zero"))


def _epilogue(n: Numbers, t: Tensors) -> Callable[..., Epilogue]:
    """Made anew for the carried branch of an addition, if there is one."""
    grid = _output_grid(n)

    def finish(carried: Tensor | None = None) -> Epilogue:
        residual = None
        if carried is not None:
            residual = Residual(carried, n["carried_multiplier"], n["carried_zero"])
        return Epilogue(t["multiplier"], t["bias"], residual, n["relu"], grid)

    return finish


def _output_grid(n: Numbers) -> Int8Grid | None:
    """Of what a layer writes; ReLU6 may cut off more than the grid does."""
    if not n["grid"]:
        return None
    grid = Grid.of(n["grid"])
    high = grid.high
    if n["ceiling"] is not None:
        high = min(high, round(n["ceiling"] / grid.scale) + grid.zero)
    return Int8Grid(grid.zero, grid.low, high, grid.packed)


def _max_pool(n: Numbers, t: Tensors, at: Place) -> Run:
    """Of integers: the largest of shifted views, one for each place in the window."""
    kernel, stride, padding, dilation = (
        n[name] for name in ("kernel", "stride", "padding", "dilation")
    )
    pad = (padding[1], padding[1], padding[0], padding[0])

    def places(size: int, axis: int) -> list[slice]:
        count = (size - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        last, step = (count - 1) * stride[axis] + 1, stride[axis]
        return [
            slice(at, at + last, step)
            for at in range(0, kernel[axis] * dilation[axis], dilation[axis])
        ]

    def run(codes: Tensor) -> Tensor:
        padded = F.pad(codes, pad, value=-128)
        rows, columns = places(padded.shape[2], 0), places(padded.shape[3], 1)
        first, *views = (padded[:, :, i, j] for i in rows for j in columns)
        largest = first.clone(memory_format=torch.channels_last)
        for view in views:
            torch.maximum(largest, view, out=largest)
        return largest

    return run


def _mean(n: Numbers, t: Tensors, at: Place) -> Run:
    """Over height and width, in float32, of the exact sum of the integers."""
    grid = Grid.of(n["grid"])

    def run(codes: Tensor) -> Tensor:
        count = codes.shape[2] * codes.shape[3]
        total = codes.sum((2, 3), dtype=torch.int32) - grid.zero * count
        mean = total.float() / count * grid.scale
        return mean[:, :, None, None] if n["keepdim"] else mean

    return run


def _call(n: Numbers, t: Tensors, at: Place) -> Run:
    """A function of ``FLOAT``; those that only move values take integers too."""
    function = FLOAT[n["function"]]

    def run(*inputs: Tensor) -> Any:
        args = [decode(a, inputs, t) for a in n["args"]]
        result = function(*args, **{key: decode(a, inputs, t) for key, a in n["kwargs"].items()})
        if result.dtype == torch.int8 and result.ndim == 4:  # as the integer layers want it
            return result.contiguous(memory_format=torch.channels_last)
        return result

    return run


def decode(stored: Any, inputs: tuple[Tensor, ...], tensors: Tensors) -> Any:
    """An argument from what ``encode`` made of it."""
    if isinstance(stored, list):
        return tuple(decode(item, inputs, tensors) for item in stored)
    if not isinstance(stored, dict):
        return stored
    if "input" in stored:
        return inputs[stored["input"]]
    if "tensor" in stored:
        return tensors[stored["tensor"]]
    return slice(*stored["slice"])


OPERATIONS: dict[str, Callable[[Numbers, Tensors, Place], Run]] = {
    "call": _call,
    "conv": _conv,
    "dequantize": _dequantize,
    "float_conv": _float_conv,
    "float_linear": _float_linear,
    "linear": _linear,
    "max_pool": _max_pool,
    "mean": _mean,
    "quantize": _quantize,
    "requantize": _requantize,
}


def check(step: Step) -> None:
    """Refuse a step that this version cannot run.

    Raises:
        InputError: naming the operation or function.
    """
    if step.op not in OPERATIONS:
        raise InputError(f"the model needs the operation {step.op!r}; update dfq.")
    if step.op == "call" and step.numbers.get("function") not in FLOAT:
        name = step.numbers.get("function")
        raise InputError(f"the model calls {name!r}, which this dfq does not know; update dfq.")

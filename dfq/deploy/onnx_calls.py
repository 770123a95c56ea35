"""The float operations of a program as ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from dfq.deploy.calls import pair
from dfq.deploy.program import Grid, Step
from dfq.types import InputError

SAME = {  # one node, the inputs as they are
    "add": "Add",
    "mul": "Mul",
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "hardswish": "HardSwish",
}
MOVES = ("cat", "flatten", "getitem", "pad", "reshape")  # of integers too: they keep their grid


def convert(graph: Any, step: Step, tensors: dict[str, Tensor]) -> None:
    """Add the nodes of a ``call`` to ``graph``.

    Raises:
        InputError: if ONNX has no operator for it here.
    """
    name = step.numbers["function"]
    moves = name in MOVES and all(value in graph.grids for value in step.inputs)
    inputs = list(step.inputs) if moves else [graph.as_float(value) for value in step.inputs]
    if moves:
        graph.grids[step.output] = graph.grids[step.inputs[0]]
    args = [_argument(graph, argument, inputs, tensors) for argument in step.numbers["args"]]
    kwargs = step.numbers["kwargs"]
    if name in SAME:
        values = [arg if isinstance(arg, str) else graph.constant(arg) for arg in args]
        graph.node(SAME[name], values, step.output)
    elif name in _CONVERTERS:
        _CONVERTERS[name](graph, args, kwargs, step.output)
    else:
        raise InputError(f"the model calls {name}, for which this dfq writes no ONNX operator.")


def container(grid: Grid) -> Any:
    """The type that ONNX keeps the codes of a grid in."""
    return np.uint8 if grid.quant_min >= 0 else np.int8


def _argument(graph: Any, stored: Any, inputs: list[str], tensors: dict[str, Tensor]) -> Any:
    """Names for values and tensors; numbers, lists and slices as they are."""
    if isinstance(stored, dict) and "input" in stored:
        return inputs[stored["input"]]
    if isinstance(stored, dict) and "tensor" in stored:
        return graph.constant(tensors[stored["tensor"]])
    if isinstance(stored, list):
        return [_argument(graph, item, inputs, tensors) for item in stored]
    return stored


def _batch_norm(graph: Any, args: list[Any], kwargs: dict[str, Any], output: str) -> None:
    x, mean, var, weight, bias, *_, eps = args
    if weight is None or bias is None:
        raise InputError("a BatchNorm without weight and bias, alone, has no ONNX operator here.")
    graph.node("BatchNormalization", [x, weight, bias, mean, var], output, epsilon=eps)


def _getitem(graph: Any, args: list[Any], kwargs: dict[str, Any], output: str) -> None:
    x, items = args
    slices = items if isinstance(items, list) else [items]
    found = [(axis, item["slice"]) for axis, item in enumerate(slices) if isinstance(item, dict)]
    if len(found) != len(slices):
        raise InputError("the model indexes by a number; ONNX gets slices alone from this dfq.")
    cuts = [(axis, cut) for axis, cut in found if cut != [None, None, None]]
    last = np.iinfo(np.int64).max
    starts = [cut[0] or 0 for _, cut in cuts]
    ends = [last if cut[1] is None else cut[1] for _, cut in cuts]
    steps = [cut[2] or 1 for _, cut in cuts]
    axes = [axis for axis, _ in cuts]
    values = [graph.constant(value, np.int64) for value in (starts, ends, axes, steps)]
    graph.node("Slice", [x, *values], output)


def _pad(graph: Any, args: list[Any], kwargs: dict[str, Any], output: str) -> None:
    x, pads, *_ = args
    before, after = pads[::2], pads[1::2]
    axes = [-1 - i for i in range(len(before))]
    inputs = [x, graph.constant([*before, *after], np.int64)]
    grid = graph.grids.get(output)
    zero = graph.constant(0.0)
    if grid is not None:
        zero = graph.constant(grid.zero_point, container(grid))
    graph.node("Pad", [*inputs, zero, graph.constant(axes, np.int64)], output)


def _flatten(graph: Any, args: list[Any], kwargs: dict[str, Any], output: str) -> None:
    start, end = [
        *args[1:],
        *[kwargs.get("start_dim", 0), kwargs.get("end_dim", -1)][len(args) - 1 :],
    ]
    if (start, end) != (1, -1):
        raise InputError("the model flattens some dimensions alone; ONNX gets all but the first.")
    graph.node("Flatten", [args[0]], output)


def _mean(graph: Any, args: list[Any], kwargs: dict[str, Any], output: str) -> None:
    dims = args[1] if len(args) > 1 else kwargs["dim"]
    axes = graph.constant(dims if isinstance(dims, list) else [dims], np.int64)
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    graph.node("ReduceMean", [args[0], axes], output, keepdims=int(keep))


def _pool(kind: str) -> Callable[..., None]:
    def convert(graph: Any, args: list[Any], kwargs: dict[str, Any], output: str) -> None:
        names = ["kernel_size", "stride", "padding"]
        names += (
            ["dilation", "ceil_mode"] if kind == "MaxPool" else ["ceil_mode", "count_include_pad"]
        )
        values = kwargs | dict(zip(names, args[1:], strict=False))
        kernel = pair(values["kernel_size"])
        attributes = {
            "kernel_shape": kernel,
            "strides": pair(values.get("stride") or kernel),
            "pads": pair(values.get("padding", 0)) * 2,
            "ceil_mode": int(values.get("ceil_mode", False)),
        }
        if kind == "MaxPool":
            attributes["dilations"] = pair(values.get("dilation", 1))
        else:
            attributes["count_include_pad"] = int(values.get("count_include_pad", True))
        graph.node(kind, [args[0]], output, **attributes)

    return convert


def _interpolate(graph: Any, args: list[Any], kwargs: dict[str, Any], output: str) -> None:
    names = ("size", "scale_factor", "mode")
    values = kwargs | dict(zip(names, args[1:], strict=False))
    factor = values.get("scale_factor")
    if factor is None or values.get("mode", "nearest") != "nearest":
        raise InputError("ONNX gets interpolation from this dfq only if nearest, by a factor.")
    factors = factor if isinstance(factor, list) else [factor, factor]
    graph.node(
        "Resize",
        [args[0], "", graph.constant([1.0, 1.0, *factors])],
        output,
        coordinate_transformation_mode="asymmetric",
        mode="nearest",
        nearest_mode="floor",
    )


def _adaptive(graph: Any, args: list[Any], kwargs: dict[str, Any], output: str) -> None:
    if args[1] not in (1, [1, 1]):
        raise InputError("adaptive pooling to more than one value has no ONNX operator.")
    graph.node("GlobalAveragePool", [args[0]], output)


def _clip(low: float | None, high: float | None) -> Callable[..., None]:
    def convert(graph: Any, args: list[Any], kwargs: dict[str, Any], output: str) -> None:
        ends = args[1:3] or [low, high]
        graph.node("Clip", [args[0], *(graph.constant(end) for end in ends)], output)

    return convert


def _silu(graph: Any, args: list[Any], kwargs: dict[str, Any], output: str) -> None:
    graph.node("Mul", [args[0], graph.node("Sigmoid", [args[0]])], output)


_CONVERTERS: dict[str, Callable[..., None]] = {
    "adaptive_avg_pool2d": _adaptive,
    "avg_pool2d": _pool("AveragePool"),
    "batch_norm": _batch_norm,
    "cat": lambda g, a, k, o: g.node("Concat", a[0], o, axis=a[1] if len(a) > 1 else k["dim"]),
    "flatten": _flatten,
    "getitem": _getitem,
    "hardtanh": _clip(-1.0, 1.0),
    "interpolate": _interpolate,
    "leaky_relu": lambda g, a, k, o: g.node(
        "LeakyRelu", a[:1], o, alpha=a[1] if len(a) > 1 else k.get("negative_slope", 0.01)
    ),
    "max_pool2d": _pool("MaxPool"),
    "mean": _mean,
    "pad": _pad,
    "relu6": _clip(0.0, 6.0),
    "reshape": lambda g, a, k, o: g.node("Reshape", [a[0], g.constant(a[1], np.int64)], o),
    "silu": _silu,
    "softmax": lambda g, a, k, o: g.node(
        "Softmax", a[:1], o, axis=a[1] if len(a) > 1 else k["dim"]
    ),
}

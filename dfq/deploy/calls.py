"""Float operations of a traced student as calls that a file may name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dfq.types import InputError

FUNCTIONS: dict[Any, str] = {
    F.adaptive_avg_pool2d: "adaptive_avg_pool2d",
    F.avg_pool2d: "avg_pool2d",
    F.hardswish: "hardswish",
    F.interpolate: "interpolate",
    F.leaky_relu: "leaky_relu",
    F.max_pool2d: "max_pool2d",
    F.pad: "pad",
    F.relu: "relu",
    F.relu6: "relu6",
    F.sigmoid: "sigmoid",
    F.silu: "silu",
    F.softmax: "softmax",
    operator.add: "add",
    operator.getitem: "getitem",
    operator.iadd: "add",
    operator.mul: "mul",
    torch.add: "add",
    torch.cat: "cat",
    torch.flatten: "flatten",
    torch.mean: "mean",
    torch.mul: "mul",
    torch.relu: "relu",
    torch.sigmoid: "sigmoid",
    torch.softmax: "softmax",
    torch.tanh: "tanh",
}
METHODS = {  # with the tensor as first argument
    "add": "add",
    "flatten": "flatten",
    "mean": "mean",
    "mul": "mul",
    "relu": "relu",
    "reshape": "reshape",
    "sigmoid": "sigmoid",
    "softmax": "softmax",
    "tanh": "tanh",
    "view": "reshape",
}
MODULES: dict[type[nn.Module], Callable[[Any], tuple[str, list[Any]]]] = {
    nn.AdaptiveAvgPool2d: lambda m: ("adaptive_avg_pool2d", [m.output_size]),
    nn.AvgPool2d: lambda m: (
        "avg_pool2d",
        [m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad],
    ),
    nn.Flatten: lambda m: ("flatten", [m.start_dim, m.end_dim]),
    nn.Hardswish: lambda m: ("hardswish", []),
    nn.LeakyReLU: lambda m: ("leaky_relu", [m.negative_slope]),
    nn.MaxPool2d: lambda m: (
        "max_pool2d",
        [m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode],
    ),
    nn.ReLU6: lambda m: ("relu6", []),
    nn.SiLU: lambda m: ("silu", []),
    nn.Sigmoid: lambda m: ("sigmoid", []),
    nn.Softmax: lambda m: ("softmax", [m.dim]),
    nn.Tanh: lambda m: ("tanh", []),
    nn.ZeroPad2d: lambda m: ("pad", [list(m.padding)]),
}
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)


class Call:
    """A function's name and its arguments, in which nodes and tensors are numbered or named."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.inputs: list[fx.Node] = []
        self.tensors: dict[str, Tensor] = {}
        self.args: list[Any] = []
        self.kwargs: dict[str, Any] = {}

    @property
    def moves(self) -> bool:
        """Whether it moves values of one tensor, or chooses among them, and changes none.

        Such an operation gives the same before and after values are rounded to a grid.
        """
        if len(self.inputs) != 1:
            return False
        if self.function == "pad":
            value = self._argument(3, "value", None)
            return self._argument(2, "mode", "constant") == "constant" and not value
        if self.function == "max_pool2d":
            ceil, indices = self._argument(5, "ceil_mode", False), self.kwargs.get("return_indices")
            return not ceil and not indices
        return self.function in ("getitem", "flatten", "reshape")

    @property
    def joins(self) -> bool:
        """Whether it puts tensors side by side: rounded before or after that, they are the same."""
        return self.function == "cat"

    @property
    def averages_maps(self) -> bool:
        """Whether it takes the mean over height and width of [B, C, H, W]."""
        if self.function == "mean":
            dims = self._argument(1, "dim", None)
            whole = isinstance(dims, list) and sorted(dims) in ([2, 3], [-2, -1])
            return whole and not self._argument(2, "keepdim", False)
        return self.function == "adaptive_avg_pool2d" and self.args[1] in (1, [1, 1])

    def window(self) -> dict[str, list[int]]:
        """Of max_pool2d: kernel, stride, padding and dilation along height and width."""
        kernel = pair(self._argument(1, "kernel_size", 1))
        return {
            "kernel": kernel,
            "stride": pair(self._argument(2, "stride", None) or kernel),
            "padding": pair(self._argument(3, "padding", 0)),
            "dilation": pair(self._argument(4, "dilation", 1)),
        }

    def _argument(self, index: int, name: str, default: Any) -> Any:
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def numbers(self) -> dict[str, Any]:
        """What the step stores."""
        return {"function": self.function, "args": self.args, "kwargs": self.kwargs}

    def encode(self, argument: Any) -> Any:
        """An argument as JSON has it; ``operations.decode`` reads it."""
        if isinstance(argument, fx.Node):
            self.inputs.append(argument)
            return {"input": len(self.inputs) - 1}
        if isinstance(argument, Tensor):
            name = f"t{len(self.tensors)}"
            self.tensors[name] = argument.detach()
            return {"tensor": name}
        if isinstance(argument, tuple | list):
            return [self.encode(item) for item in argument]
        if isinstance(argument, slice):
            return {"slice": [argument.start, argument.stop, argument.step]}
        if argument is None or isinstance(argument, bool | int | float | str):
            return argument
        raise InputError(f"{self.function} has an argument {argument!r} that no file can hold.")


def float_call(node: fx.Node, module: nn.Module | None) -> Call:
    """What a node computes in float.

    Raises:
        InputError: if no function of ``operations.FLOAT`` does that.
    """
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        call = Call("batch_norm")
        stored = (module.running_mean, module.running_var, module.weight, module.bias)
        call.args = [call.encode(a) for a in (node.args[0], *stored, False, 0.0, module.eps)]
        return call
    name, rest = "relu", list[Any]()
    if module is not None and not isinstance(module, nn.ReLU):
        make = MODULES.get(type(module))
        if make is None:
            raise InputError(f"{node.target} is a {type(module).__name__}, which no step can run.")
        name, rest = make(module)
    elif module is None:
        found = FUNCTIONS.get(node.target) or METHODS.get(str(node.target))
        if found is None or node.op not in ("call_function", "call_method"):
            raise InputError(f"the model calls {node.target}, which no step can run.")
        name = found
    call = Call(name)
    args = [*node.args, *rest]
    if name == "reshape" and not isinstance(args[1], tuple | list):
        args = [args[0], args[1:]]  # x.view(2, 3) is x.view((2, 3))
    call.args = [call.encode(argument) for argument in args]
    call.kwargs = {key: call.encode(argument) for key, argument in node.kwargs.items()}
    return call


def pair(value: Any) -> list[int]:
    """Of height and width, from one number for both or one for each."""
    return [value, value] if isinstance(value, int) else list(value)

"""A packed model as an ONNX graph: QuantizeLinear and DequantizeLinear around float operators.

That is the form that runtimes turn into integer kernels. Codes are uint8 (int8 where they can be
negative) whatever their bits; a Clip keeps them in range where the grid is smaller. Weights of at
most 4 bits are stored as INT8, which ONNX Runtime fuses, or as INT4.

A layer between 8-bit codes has its bias in int32 on the grid of its sums, as integer operators want
it. Elsewhere that would only cost exactness, since a sum of few bits is coarse and a code that is
off by one changes many behind it: there the bias is added in float, by a node of its own, because
ONNX Runtime rounds that of a Conv by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfq.deploy import onnx_calls
from dfq.deploy.onnx_calls import container
from dfq.deploy.packed import PackedModel
from dfq.deploy.program import INPUT, Grid, Step, output_names
from dfq.outputs import tensors
from dfq.types import InputError
from dfq_kernels.integer import integers

OPSET = 21  # the first with INT4


def export_onnx(model: PackedModel, path: str | Path, *, int4: bool = False) -> None:
    """Write ``model`` to an ``.onnx`` file; batch, height and width stay open.

    Several maps become several outputs, in the order of the model's own containers.

    Args:
        model: from ``freeze``.
        path: of the file.
        int4: store weights of at most 4 bits as INT4.

    Raises:
        InputError: onnx is not installed, or the model has an operation that ONNX lacks.
    """
    try:
        import onnx
    except ImportError:
        raise InputError(
            "exporting to ONNX needs the package onnx; run: pip install onnx"
        ) from None
    graph = Graph(model, int4)
    for step in model.program.steps:
        graph.convert(step)
    outputs = [graph.as_float(name) for name in output_names(model.program.output)]
    device = next((t.device for t in model.buffers()), torch.device("cpu"))
    read = {name for node in graph.nodes for name in node.input}
    given = tensors(model(torch.zeros(1, *model.program.image, device=device)))
    made = onnx.helper.make_graph(
        graph.nodes,
        "dfq",
        [_open(onnx, INPUT, 4)],
        [_open(onnx, name, value.ndim) for name, value in zip(outputs, given, strict=True)],
        [constant for constant in graph.initializers if constant.name in read],
    )
    opset = [onnx.helper.make_opsetid("", OPSET)]
    whole = onnx.helper.make_model(made, opset_imports=opset, producer_name="dfq", ir_version=10)
    onnx.checker.check_model(whole)
    onnx.save(whole, str(path))


class Graph:
    """ONNX nodes as they come; values are float, or integers whose grid is remembered."""

    def __init__(self, model: PackedModel, int4: bool = False) -> None:
        import onnx

        self.onnx, self.int4 = onnx, int4
        self.stored = model.tensors()
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.grids: dict[str, Grid] = {}

    def convert(self, step: Step) -> None:
        """Add the nodes of a step; the value that it writes keeps its name."""
        getattr(self, f"_{step.op}")(step, {r: self.stored[n] for r, n in step.tensors.items()})

    def node(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, value: Any, kind: Any = np.float32) -> str:
        """Add a constant and return its name."""
        array = np.asarray(value.cpu() if isinstance(value, Tensor) else value, dtype=kind)
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(self.onnx.numpy_helper.from_array(array, name))
        return name

    def as_float(self, name: str) -> str:
        """A value in float."""
        if name not in self.grids:
            return name
        return self.node("DequantizeLinear", [name, *self._parameters(self.grids[name])])

    def on_grid(self, value: str, grid: Grid, output: str) -> None:
        """Quantize a float value."""
        codes = np.iinfo(container(grid))
        if (grid.quant_min, grid.quant_max) != (codes.min, codes.max):
            ends = (grid.quant_min - grid.zero_point, grid.quant_max - grid.zero_point)
            low, high = (self.constant(end * np.float32(grid.scale)) for end in ends)
            value = self.node("Clip", [value, low, high])
        self.node("QuantizeLinear", [value, *self._parameters(grid)], output)
        self.grids[output] = grid

    def _parameters(self, grid: Grid) -> list[str]:
        zero = self.constant(grid.zero_point, container(grid))
        return [self.constant(grid.scale), zero]

    def _quantize(self, step: Step, tensors: dict[str, Tensor]) -> None:
        self.on_grid(step.inputs[0], Grid.of(step.numbers["grid"]), step.output)

    def _dequantize(self, step: Step, tensors: dict[str, Tensor]) -> None:
        self.node("Identity", [self.as_float(step.inputs[0])], step.output)

    def _requantize(self, step: Step, tensors: dict[str, Tensor]) -> None:
        self.on_grid(self.as_float(step.inputs[0]), Grid.of(step.numbers["grid"]), step.output)

    def _max_pool(self, step: Step, tensors: dict[str, Tensor]) -> None:
        n = step.numbers
        window = {"kernel_shape": n["kernel"], "strides": n["stride"], "dilations": n["dilation"]}
        self.node("MaxPool", [step.inputs[0]], step.output, pads=n["padding"] * 2, **window)
        self.grids[step.output] = self.grids[step.inputs[0]]

    def _mean(self, step: Step, tensors: dict[str, Tensor]) -> None:
        inputs = [self.as_float(step.inputs[0]), self.constant([2, 3], np.int64)]
        self.node("ReduceMean", inputs, step.output, keepdims=int(step.numbers["keepdim"]))

    def _call(self, step: Step, tensors: dict[str, Tensor]) -> None:
        onnx_calls.convert(self, step, tensors)

    def _conv(self, step: Step, tensors: dict[str, Tensor]) -> None:
        n = step.numbers
        inputs, bias = self._operands(step, tensors, lambda w: w.permute(0, 3, 1, 2))
        value = self.node("Conv", inputs, **_geometry(n))
        self._finish(step, value, None if bias is None else bias.view(-1, 1, 1))

    def _linear(self, step: Step, tensors: dict[str, Tensor]) -> None:
        inputs, bias = self._operands(step, tensors, lambda w: w)
        self._finish(step, self.node("Gemm", inputs, transB=1), bias)

    def _float_conv(self, step: Step, tensors: dict[str, Tensor]) -> None:
        weight, scale = self._weight(step, tensors).permute(0, 3, 1, 2), tensors["scale"]
        inputs = [self.as_float(step.inputs[0]), self._scaled(weight, scale)]
        bias = [self.constant(tensors["bias"])] if "bias" in tensors else []
        self.node("Conv", inputs + bias, step.output, **_geometry(step.numbers))

    def _float_linear(self, step: Step, tensors: dict[str, Tensor]) -> None:
        weight = self._scaled(self._weight(step, tensors), tensors["scale"])
        bias = [self.constant(tensors["bias"])] if "bias" in tensors else []
        inputs = [self.as_float(step.inputs[0]), weight, *bias]
        self.node("Gemm", inputs, step.output, transB=1)

    def _weight(self, step: Step, tensors: dict[str, Tensor]) -> Tensor:
        zero = tensors.get("weight_zero")
        return integers(tensors["weight"], zero, list(step.numbers["shape"]))

    def _scaled(self, weight: Tensor, scale: Tensor, codes: Grid | None = None) -> str:
        """Integer weights and their scale by output channel, as a DequantizeLinear.

        ``codes`` are those that they meet. Large weights are stored without a sign if those have
        none: CPUs without VNNI (AVX2 and older) add two products of a byte with and one without a
        sign in int16, and ONNX Runtime lets them saturate; bytes of one kind are widened first.
        """
        low, high = int(weight.min()), int(weight.max())
        four = self.int4 and low >= -8 and high <= 7
        if not four and not -128 <= low <= high <= 127:  # asymmetric weights less their zero
            return self.constant(weight * scale.view(-1, *[1] * (weight.ndim - 1)))
        if codes and not _adds_in_int16(codes, max(-low, high)):
            name, zero = self.constant(weight + 128, np.uint8), np.full(len(scale), 128)
            inputs = [name, self.constant(scale), self.constant(zero, np.uint8)]
            return self.node("DequantizeLinear", inputs, axis=0)
        name = self.constant(weight, np.int8)
        if four:
            proto = self.onnx.helper.make_tensor(
                name, self.onnx.TensorProto.INT4, weight.shape, weight.flatten().tolist()
            )
            self.initializers[-1] = proto
        return self.node("DequantizeLinear", [name, self.constant(scale)], axis=0)

    def _operands(
        self, step: Step, tensors: dict[str, Tensor], layout: Any
    ) -> tuple[list[str], Tensor | None]:
        """Inputs of a layer's node, and the bias if that is to be added behind it."""
        source = self.grids[step.inputs[0]]
        unit = self._unit(step)
        scale = tensors["multiplier"].double() * unit / source.scale
        bias = tensors["bias"].double() * unit
        weight = self._weight(step, tensors)
        # a channel that hardly counts, beside a bias too large for its grid: the bias alone is left
        least = bias.abs() / 2**30 / source.scale
        dead = scale.abs() < least
        weight = torch.where(dead.view(-1, *[1] * (weight.ndim - 1)), 0, weight)
        scale = torch.where(dead, least.clamp(min=1e-30), scale)
        flip = scale < 0  # runtimes want positive scales
        weight = torch.where(flip.view(-1, *[1] * (weight.ndim - 1)), -weight, weight)
        scale = scale.abs()
        if not _fuses(step):
            weights = self._scaled(layout(weight), scale, source)
            return [self.as_float(step.inputs[0]), weights], bias
        weight, scale = self._refined(weight, scale, bias / source.scale, source)
        sums = scale * source.scale
        bias_codes = self.constant((bias / sums).round(), np.int32)
        dequantized = self.node("DequantizeLinear", [bias_codes, self.constant(sums)], axis=0)
        weights = self._scaled(layout(weight), scale, source)
        return [self.as_float(step.inputs[0]), weights, dequantized], None

    def _refined(
        self, weight: Tensor, scale: Tensor, bias: Tensor, source: Grid
    ) -> tuple[Tensor, Tensor]:
        """Weights of few bits times a power of two, by channel, and their scale over it.

        The products stay what they are and the grid of the bias becomes as much finer: rounded to
        that of 4-bit weights it would move some percent of the activations by one.
        """
        largest = weight.flatten(1).abs().amax(1)
        if self.int4 and int(weight.min()) >= -8 and int(weight.max()) <= 7:
            return weight, scale  # they would not fit INT4 any more
        # two products with 8-bit activations must not leave int16, where some CPUs add them
        most = 127 if source.quant_max - source.quant_min < 128 else 64
        room = (most / largest.clamp(min=1)).log2().floor()
        for_bias = (scale * 2**30 / bias.abs().clamp(min=1e-30)).log2().floor()
        finer = 2 ** torch.minimum(room.double(), for_bias).clamp(min=0)
        by_channel = finer.int().view(-1, *[1] * (weight.ndim - 1))
        return weight * by_channel, scale / finer

    def _unit(self, step: Step) -> float:
        """The scale of what a layer writes."""
        stored = step.numbers["grid"]
        return Grid.of(stored).scale if stored else 1.0

    def _finish(self, step: Step, value: str, bias: Tensor | None) -> None:
        n = step.numbers
        if bias is not None:
            value = self.node("Add", [value, self.constant(bias)])
        if len(step.inputs) > 1:
            value = self.node("Add", [value, self.as_float(step.inputs[1])])
        if n["relu"]:
            value = self.node("Relu", [value])
        if n["ceiling"] is not None:
            value = self.node("Clip", [value, "", self.constant(n["ceiling"])])
        if n["grid"]:
            self.on_grid(value, Grid.of(n["grid"]), step.output)
        else:
            self.node("Identity", [value], step.output)


def _adds_in_int16(codes: Grid, weight: int) -> bool:
    """Whether two products of codes and weights of that size are sure to."""
    return codes.quant_min < 0 or 2 * codes.quant_max * weight <= np.iinfo(np.int16).max


def _fuses(step: Step) -> bool:
    """Whether a layer ends in 8-bit codes, without a sum: runtimes make one operator of it."""
    grid = step.numbers["grid"]
    if not grid or len(step.inputs) > 1:
        return False
    found, codes = Grid.of(grid), np.iinfo(container(Grid.of(grid)))
    return (found.quant_min, found.quant_max) == (codes.min, codes.max)


def _geometry(n: Any) -> dict[str, Any]:
    pads = [*n["padding"], *n["padding"]]
    return {"strides": n["stride"], "pads": pads, "dilations": n["dilation"], "group": n["groups"]}


def _open(onnx: Any, name: str, rank: int) -> Any:
    """A value of float32 whose sizes are open."""
    sizes = ["batch", *(f"{name}_{axis}" for axis in range(1, rank))]
    return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)

"""The graph of a student becomes a program on integers: BatchNorm folded, layers fused, codes kept.

A layer takes in what alone follows it: BatchNorm, ReLU, the addition of another branch. Its output
is written as integers where all who read it read one grid. Integers stay integers through pooling,
padding, slicing and concatenation. What there is no integer step for runs in float32, on the
values that the integers stand for, as in the student.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from dfq.deploy.calls import IDENTITIES, Call, float_call
from dfq.deploy.chains import Chain, find_chains, module_of
from dfq.deploy.fold import fold, grid_of, unfused
from dfq.deploy.packed import PackedModel
from dfq.deploy.program import INPUT, Grid, Program, Step
from dfq.prepare.adds import QAdd
from dfq.prepare.layers import QConv2d, QLinear, QReLU
from dfq.prepare.trace import trace
from dfq.types import InputError


def freeze(student: nn.Module, image: tuple[int, int, int]) -> PackedModel:
    """``student`` as integers, its values the same but where float rounding decides a tie.

    Args:
        student: from ``prepare``, with its scales; it stays as it is.
        image: (channels, height, width) of one image.

    Raises:
        InputError: if the student has no scales, or its graph cannot be told or run as data.
    """
    graph = trace(student)
    if graph is None:
        raise InputError(
            f"{type(student).__name__} cannot be traced, so it cannot be stored as data; remove "
            "control flow that depends on values, or on training mode."
        )
    compiler = _Compiler(student, graph)
    output = compiler.compile()
    return PackedModel(Program(tuple(compiler.steps), output, image), compiler.tensors)


class _Compiler:
    """Walks the graph and keeps, for each node, where its values are: float32, or on which grid."""

    def __init__(self, student: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(student.named_modules())
        self.graph = graph
        self.chains, self.inner = find_chains(graph, self.modules)
        self.steps: list[Step] = []
        self.tensors: dict[str, Tensor] = {}
        self.floats: dict[fx.Node, str] = {}
        self.codes: dict[tuple[fx.Node, Grid], str] = {}
        self.grids: dict[fx.Node, Grid] = {}  # where the student's values lie on one grid

    def compile(self) -> Any:
        """Make all steps and return the name of the output."""
        for node in self.graph.nodes:
            if node.op == "output":
                return self._output(node.args[0])
            if node not in self.inner:
                self._visit(node)
        raise AssertionError("a graph ends with its output")

    def _visit(self, node: fx.Node) -> None:
        module = module_of(node, self.modules)
        if node.op == "placeholder":
            self.floats[node] = INPUT
        elif node in self.chains:
            self._layer(node, self.chains[node])
        elif isinstance(module, IDENTITIES):
            self._alias(node, node.args[0])
        elif isinstance(module, QReLU | QAdd):
            self._quantized(node, module)
        else:
            self._moved_or_called(node, float_call(node, module))

    def _layer(self, node: fx.Node, chain: Chain) -> None:
        """A layer and what it took in."""
        kind = "conv" if isinstance(chain.layer, QConv2d) else "linear"
        if not chain.integer:
            alone = unfused(chain.layer)
            source_name = self._float(chain.source)
            self.floats[node] = self._add(
                f"float_{kind}", (source_name,), alone.numbers, alone.tensors
            )
            return
        source = self._source_grid(chain)
        output = grid_of(chain.grid) if chain.grid is not None else self._demanded(node)
        carried = self._carried_grid(chain)
        folded = fold(chain, source, output, carried)
        inputs = [self._codes(chain.source, source)]
        if carried and chain.carried is not None:
            inputs.append(self._codes(chain.carried, carried))
        name = self._add(kind, tuple(inputs), folded.numbers, folded.tensors)
        if output is None:
            cut = chain.ceiling is not None
            self.floats[node] = self._call("hardtanh", (name,), 0.0, chain.ceiling) if cut else name
        else:
            self.codes[node, output] = name
            if chain.grid is not None:
                self.grids[node] = output

    def _quantized(self, node: fx.Node, module: Any) -> None:
        """A QReLU or QAdd that no layer took in: in float, then on its grid."""
        if isinstance(module, QAdd):
            carried, computed = node.args
            names = (self._carried_float(carried, module), self._float(computed))
            name = self._call("add", names)
            relu = module.relu
        else:
            name, relu = self._float(node.args[0]), True
        if relu:
            name = self._call("relu", (name,))
        if isinstance(module, QReLU) and module.maximum is not None:
            name = self._call("hardtanh", (name,), 0.0, module.maximum)
        grid = grid_of(module.quantizer)
        self.codes[node, grid] = self._add("quantize", (name,), {"grid": grid.as_dict()})
        self.grids[node] = grid

    def _moved_or_called(self, node: fx.Node, call: Call) -> None:
        source: Any = call.inputs[0] if call.inputs else None
        if call.averages_maps and source in self.grids:
            grid = self.grids[source]
            numbers = {"grid": grid.as_dict(), "keepdim": call.function != "mean"}
            self.floats[node] = self._add("mean", (self._codes(source, grid),), numbers)
            return
        joined = self._demanded(node) if call.joins else None
        if joined is not None:
            names = tuple(self._codes(each, joined) for each in call.inputs)
            self.codes[node, joined] = self._add("call", names, call.numbers(), call.tensors)
            return
        grids = [grid for of, grid in self.codes if of is source]
        if call.moves and grids:
            for grid in grids:
                self.codes[node, grid] = self._move(call, self.codes[source, grid], grid)
            if source in self.grids:
                self.grids[node] = self.grids[source]
            return
        inputs = tuple(self._float(each) for each in call.inputs)
        self.floats[node] = self._add("call", inputs, call.numbers(), call.tensors)

    def _move(self, call: Call, codes: str, grid: Grid) -> str:
        """An operation that only moves values, on integers; padding is with real zero."""
        if call.function == "max_pool2d":
            return self._add("max_pool", (codes,), call.window())
        numbers = call.numbers()
        if call.function == "pad":
            numbers["kwargs"] = {"value": grid.zero}
        return self._add("call", (codes,), numbers, call.tensors)

    def _source_grid(self, chain: Chain) -> Grid:
        quantizer = chain.layer.input_quantizer
        return self.grids[chain.source] if quantizer is None else grid_of(quantizer)

    def _carried_grid(self, chain: Chain) -> Grid | None:
        if chain.add is None or chain.carried is None:
            return None
        quantizer = chain.add.carried_quantizer
        return self.grids[chain.carried] if quantizer is None else grid_of(quantizer)

    def _carried_float(self, carried: Any, add: QAdd) -> str:
        if add.carried_quantizer is None:
            return self._float(carried)
        grid = grid_of(add.carried_quantizer)
        return self._dequantize(self._codes(carried, grid), grid)

    def _demanded(self, node: fx.Node) -> Grid | None:
        """The one grid on which all readers of a value want it; None if they differ."""
        wanted = self._wants(node)
        return next(iter(wanted)) if len(wanted) == 1 else None  # which may be float: None

    def _wants(self, node: fx.Node) -> set[Grid | None]:
        return {grid for user in node.users for grid in self._want(user, node)}

    def _want(self, user: fx.Node, node: fx.Node) -> set[Grid | None]:
        module = module_of(user, self.modules)
        if isinstance(module, QConv2d | QLinear) and module.input_quantizer is not None:
            return {grid_of(module.input_quantizer)}
        if isinstance(module, QAdd) and module.carried_quantizer and user.args[0] is node:
            return {None} if user.args[1] is node else {grid_of(module.carried_quantizer)}
        if isinstance(module, IDENTITIES):
            return self._wants(user)
        if user.op == "output" or isinstance(module, QConv2d | QLinear | QReLU | QAdd):
            return {None}
        call = float_call(user, module)
        return self._wants(user) if call.moves or call.joins else {None}

    def _codes(self, node: Any, grid: Grid) -> str:
        """The integers of a value on ``grid``, made if need be."""
        if (node, grid) not in self.codes:
            own = self.grids.get(node)
            if own is not None:
                numbers = {"from": own.as_dict(), "grid": grid.as_dict()}
                name = self._add("requantize", (self.codes[node, own],), numbers)
            else:
                name = self._add("quantize", (self._float(node),), {"grid": grid.as_dict()})
            self.codes[node, grid] = name
        return self.codes[node, grid]

    def _float(self, node: Any) -> str:
        """A value in float32, made if need be."""
        if node not in self.floats:
            if node not in self.grids:
                raise InputError(f"{node} is read as what no step writes.")
            grid = self.grids[node]
            self.floats[node] = self._dequantize(self.codes[node, grid], grid)
        return self.floats[node]

    def _dequantize(self, codes: str, grid: Grid) -> str:
        return self._add("dequantize", (codes,), {"grid": grid.as_dict()})

    def _alias(self, node: fx.Node, source: Any) -> None:
        if source in self.floats:
            self.floats[node] = self.floats[source]
        if source in self.grids:
            self.grids[node] = self.grids[source]
        for grid in [grid for of, grid in self.codes if of is source]:
            self.codes[node, grid] = self.codes[source, grid]

    def _call(self, function: str, inputs: tuple[str, ...], *rest: float | None) -> str:
        args = [{"input": index} for index in range(len(inputs))]
        return self._add(
            "call", inputs, {"function": function, "args": [*args, *rest], "kwargs": {}}
        )

    def _add(
        self,
        op: str,
        inputs: tuple[str, ...],
        numbers: dict[str, Any],
        tensors: dict[str, Tensor] | None = None,
    ) -> str:
        """A step; its output and its tensors are called after its place."""
        output = f"{len(self.steps)}_{op}"
        names = {role: f"{output}.{role}" for role in tensors or {}}
        for role, tensor in (tensors or {}).items():
            self.tensors[names[role]] = tensor.detach()
        self.steps.append(Step(op, inputs, output, numbers, names))
        return output

    def _output(self, result: Any) -> Any:
        """Its name; of a tuple, list or dict those of its parts."""
        if isinstance(result, fx.Node):
            return self._float(result)
        if isinstance(result, tuple | list):
            return [self._output(part) for part in result]
        if isinstance(result, dict) and all(isinstance(key, str) for key in result):
            return {key: self._output(part) for key, part in result.items()}
        raise InputError(
            f"the model returns {type(result).__name__}; a stored model returns tensors, alone or "
            "in tuples, lists and dicts with names."
        )

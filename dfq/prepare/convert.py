"""Float model in, trainable fake-quantized student out."""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from dfq.bounds import BITS
from dfq.prepare.adds import QAdd, quantize_adds
from dfq.prepare.edges import Edges, find_edges
from dfq.prepare.frozen import freeze_batch_norm
from dfq.prepare.fusion import fuse_relus
from dfq.prepare.grid import range_to_scale
from dfq.prepare.layers import QConv2d, QLinear, QReLU
from dfq.prepare.quantizer import Quantizer
from dfq.prepare.refusal import check_layer, check_model, is_heavy
from dfq.prepare.together import quantize_weights_together
from dfq.types import DataSpec, InputError, QuantSpec

Bits = tuple[int, int]  # of weights, of activations
Overrides = Mapping[str, str | int | None]

BRECQ_EDGE_BITS = 8  # BRECQ, arXiv:2102.05426, section 4
SUM_BITS = 8  # of residual additions, whatever the bits: a byte in memory, and next to no error


def parse_bits(bits: str) -> Bits:
    """``"w4a8"`` -> (4, 8): bits of weights and of activations, each 2 to 8.

    Raises:
        InputError: on anything else.
    """
    match = re.fullmatch(r"w([2-8])a([2-8])", bits) if isinstance(bits, str) else None
    if match is None:
        raise InputError(f"bits must be like w4a4, each number 2 to 8, got {bits!r}.")
    return int(match[1]), int(match[2])


def prepare(
    model: nn.Module,
    bits: str,
    *,
    protocol: str = "brecq",
    edge_bits: int | None = None,
    scales: str = "learned",
    overrides: Overrides | None = None,
    data: DataSpec | None = None,
) -> nn.Module:
    """A trainable deep copy of ``model`` whose layers are quantized; ``calibrate`` it next.

    Every parameter requires grad, BatchNorm stays in eval mode (``Frozen``), ``model`` is left as
    it was. Layers are found as modules, never by tracing; what else is computed stays float.

    - ``brecq``: every ``nn.Conv2d`` and ``nn.Linear`` gets a weight grid per output channel and an
      input grid per tensor; the first and the last layer have 8 bits for both, and of a model that
      gives maps every layer that an output comes from. What the first layer puts out is taken in
      at 8 bits too, as in the released code of BRECQ and of GENIE. Residual additions get grids of
      8 bits where the graph of the model can be traced, and stay float elsewhere.
    - ``gdfq``: every weight at the target bits, and the output of every ``nn.ReLU`` and
      ``nn.ReLU6``. The network's input and tensors without a ReLU stay float.

    Weights are symmetric (2 bits: midrise). Activations are asymmetric and unsigned: where nothing
    is below zero the zero point is 0. With ``scales="minmax"`` weights are asymmetric too; with
    protocol ``gdfq`` that is the quantizer of the GDFQ paper.

    A module used in several places gets one grid for all of them.

    Args:
        model: float model.
        bits: e.g. ``"w4a4"``.
        protocol: which tensors are quantized.
        edge_bits: weight and input bits of the first and last layers, and with ``brecq`` at least
            those of the second layer's input; None: 8 for ``brecq``, the target bits for ``gdfq``.
        scales: ``"learned"`` (LSQ) or ``"minmax"``.
        overrides: glob over module names -> bits (``"w8a8"``, or 8 for both), or None to leave it
            float. A module's override holds for all below it; of several the last one wins.
        data: its shape finds the first, second and last layers, by running zeros through the copy,
            and its range becomes the grid of the first layer's input, so that real images are not
            clipped to what generated ones hold; None takes the order in which modules were defined.

    Raises:
        InputError: if a layer cannot be quantized, naming it and the remedy; or on bad options.
    """
    target = parse_bits(bits)
    _check_options(protocol, scales, edge_bits)
    check_model(model)
    chosen = _resolve_overrides(overrides or {}, [name for name, _ in model.named_modules()])
    layers = [n for n, m in model.named_modules() if is_heavy(m) and chosen.get(n, target)]
    for name in layers:
        check_layer(name, model.get_submodule(name))
    if not layers:
        raise InputError("the model has no nn.Conv2d or nn.Linear module to quantize.")
    student = copy.deepcopy(model)
    freeze_batch_norm(student)
    plan = dict.fromkeys(layers, target)
    edge = edge_bits or (BRECQ_EDGE_BITS if protocol == "brecq" else None)
    if edge:
        edges = _edges(student, layers, data)
        if protocol == "brecq":
            plan |= dict.fromkeys(edges.second, (target[0], max(edge, target[1])))
        plan |= dict.fromkeys([edges.order[0], *edges.outputs], (edge, edge))
    plan |= {name: bits for name, bits in chosen.items() if name in plan and bits}
    replacements = {
        student.get_submodule(name): _quantized(student.get_submodule(name), pair, protocol, scales)
        for name, pair in plan.items()
    }
    if edge and data and edges.order.count(edges.order[0]) == 1:
        _fix_input_range(replacements[student.get_submodule(edges.order[0])], data)
    if protocol == "gdfq":
        replacements |= _quantized_relus(student, chosen, target, scales)
    student = _replace(student, replacements).requires_grad_(True)
    fuse_relus(student)
    if protocol == "brecq":
        student = quantize_adds(student, _activation_spec(SUM_BITS), scales=scales)
    quantize_weights_together(student)
    return student


def _edges(student: nn.Module, layers: list[str], data: DataSpec | None) -> Edges:
    """Its first, second and last layers; without ``data`` by the order of their definition."""
    if not data:
        return Edges(layers, layers[1:2], layers[-1:])
    found = find_edges(student, layers, data.shape)
    order = found.order or layers
    heads = found.outputs if not data.classes else []
    return Edges(order, found.second, heads or order[-1:])


class Row(NamedTuple):
    """One line of ``describe``; bits are None where the tensor stays float."""

    name: str
    kind: str
    weight_bits: int | None
    input_bits: int | None  # of QReLU and QAdd: of the output


def describe(student: nn.Module) -> list[Row]:
    """Every module that holds a quantizer or a weight matrix of its own, in module order."""
    rows = []
    for name, module in student.named_modules():
        kind = type(module).__name__
        if isinstance(module, QConv2d | QLinear):
            inputs = module.input_quantizer
            bits = None if inputs is None else inputs.spec.bits
            rows.append(Row(name, kind, module.weight_quantizer.spec.bits, bits))
        elif isinstance(module, QReLU | QAdd):
            rows.append(Row(name, kind, None, module.quantizer.spec.bits))
        elif any(p.ndim > 1 for p in module.parameters(recurse=False)):
            rows.append(Row(name, kind, None, None))
    return rows


def split_parameters(student: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(parameters of the network, logarithms of learned scales), two groups for an optimizer.

    A step of ``lr`` changes a scale by the ratio ``exp(lr)``: 0.003 to 0.01 suit Adam at 2 to 4
    bits.
    """
    scales = [
        module.log_scale
        for module in student.modules()
        if isinstance(module, Quantizer) and module.mode == "learned"
    ]
    learned = {id(scale) for scale in scales}
    return [p for p in student.parameters() if id(p) not in learned], scales  # type: ignore


def _check_options(protocol: str, scales: str, edge_bits: int | None) -> None:
    if protocol not in ("brecq", "gdfq"):
        raise InputError(f"protocol must be brecq or gdfq, got {protocol!r}.")
    if scales not in ("learned", "minmax"):
        raise InputError(f"scales must be learned or minmax, got {scales!r}.")
    BITS.check(edge_bits=edge_bits)


def _resolve_overrides(overrides: Overrides, names: list[str]) -> dict[str, Bits | None]:
    """The bits of every module name that an override speaks of."""
    chosen: dict[str, Bits | None] = {}
    for pattern, bits in overrides.items():
        matched = [n for n in names if _matches(n, pattern)]
        if not matched:
            raise InputError(
                f"the override {pattern!r} matches no module; the modules are called like "
                f"{', '.join(name for name in names[-3:])}."
            )
        chosen |= dict.fromkeys(matched, None if bits is None else _pair(bits))
    return chosen


def _matches(name: str, pattern: str) -> bool:
    """Whether the pattern names the module or one above it."""
    return any(fnmatch.fnmatchcase(name, p) for p in (pattern, f"{pattern}.*"))


def _pair(bits: str | int) -> Bits:
    return parse_bits(f"w{bits}a{bits}" if isinstance(bits, int) else bits)


def _quantized(layer: nn.Module, bits: Bits, protocol: str, scales: str) -> nn.Module:
    weight_bits, input_bits = bits
    symmetric = scales == "learned"
    weight_spec = QuantSpec(
        weight_bits, symmetric=symmetric, axis=0, midrise=symmetric and weight_bits == 2
    )
    input_spec = _activation_spec(input_bits) if protocol == "brecq" else None
    if isinstance(layer, nn.Conv2d):
        return QConv2d.from_float(layer, weight_spec, input_spec, scales=scales)
    assert isinstance(layer, nn.Linear)
    return QLinear.from_float(layer, weight_spec, input_spec, scales=scales)


def _quantized_relus(
    student: nn.Module, chosen: Mapping[str, Bits | None], target: Bits, scales: str
) -> dict[nn.Module, nn.Module]:
    relus = {n: m for n, m in student.named_modules() if type(m) in (nn.ReLU, nn.ReLU6)}
    if not relus:
        raise InputError(
            "protocol gdfq quantizes the outputs of nn.ReLU and nn.ReLU6 modules and the model has "
            "none (functional calls cannot be found); make them modules or use protocol brecq."
        )
    device = next(student.parameters()).device
    return {
        relu: QReLU.from_float(relu, _activation_spec(bits[1]), scales=scales, device=device)
        for name, relu in relus.items()
        if (bits := chosen.get(name, target))
    }


def _fix_input_range(layer: nn.Module, data: DataSpec) -> None:
    """Put the layer's input, the image, on the grid that holds every possible image."""
    assert isinstance(layer, QConv2d | QLinear)
    if layer.input_quantizer is None:
        return
    spec, device = layer.input_quantizer.spec, layer.weight.device
    low, high = (torch.tensor([value], device=device) for value in data.value_range)
    layer.input_quantizer = Quantizer(spec, mode="fixed", device=device)
    layer.input_quantizer.set_qparams(*range_to_scale(low, high, spec))


def _activation_spec(bits: int) -> QuantSpec:
    return QuantSpec(bits, symmetric=False, signed=False)


def _replace(student: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """``student`` with every use of a key replaced by its value."""
    if student in replacements:
        return replacements[student]
    for parent in list(student.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None and module in replacements:
                setattr(parent, child, replacements[module])
    return student

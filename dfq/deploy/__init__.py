"""Student in, integers out: ``freeze`` it, run it, save it, load it without its class, export."""

from dfq.deploy.export import export, export_pt2
from dfq.deploy.four_bits import pack_activations
from dfq.deploy.freeze import freeze
from dfq.deploy.layers import PackedConv2d, PackedLinear, freeze_layers
from dfq.deploy.onnx_graph import export_onnx
from dfq.deploy.packed import PackedModel, load

__all__ = [
    "PackedConv2d",
    "PackedLinear",
    "PackedModel",
    "export",
    "export_onnx",
    "export_pt2",
    "freeze",
    "freeze_layers",
    "load",
    "pack_activations",
]

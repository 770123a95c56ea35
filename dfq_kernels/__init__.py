"""Quantization ops: a PyTorch reference each, and faster implementations where there are any."""

import importlib.util
import sys

if sys.argv[:1] == ["-m"] and importlib.util.find_spec("torch") is None:
    # `python -m dfq_kernels.build`, which imports this first; elsewhere it is an ImportError
    sys.exit("dfq_kernels needs torch, which is not installed; get it from https://pytorch.org.")

from dfq_kernels.batch_norm import batch_norm, batch_norm_statistics
from dfq_kernels.fake_quantize import fake_quantize
from dfq_kernels.fake_quantize_all import fake_quantize_all
from dfq_kernels.integer import Epilogue, Int8Grid, IntegerWeight, Residual, integer_weight, prepack
from dfq_kernels.packing import pack_channels, pack_int4, unpack_channels, unpack_int4
from dfq_kernels.qconv2d import Window, qconv2d
from dfq_kernels.qlinear import qlinear
from dfq_kernels.quantize import dequantize, quantize
from dfq_kernels.requantize import requantize

__all__ = [
    "Epilogue",
    "Int8Grid",
    "IntegerWeight",
    "Residual",
    "Window",
    "batch_norm",
    "batch_norm_statistics",
    "dequantize",
    "fake_quantize",
    "fake_quantize_all",
    "integer_weight",
    "pack_channels",
    "pack_int4",
    "prepack",
    "qconv2d",
    "qlinear",
    "quantize",
    "requantize",
    "unpack_channels",
    "unpack_int4",
]

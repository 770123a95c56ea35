"""Float model in, trainable fake-quantized student out: ``prepare``, then ``calibrate``."""

from dfq.prepare.calibration import calibrate, observing
from dfq.prepare.convert import Row, describe, parse_bits, prepare, split_parameters
from dfq.prepare.layers import QConv2d, QLinear, QReLU
from dfq.prepare.quantizer import Quantizer

__all__ = [
    "QConv2d",
    "QLinear",
    "QReLU",
    "Quantizer",
    "Row",
    "calibrate",
    "describe",
    "observing",
    "parse_bits",
    "prepare",
    "split_parameters",
]

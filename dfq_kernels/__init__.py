"""Quantization ops: a PyTorch reference each, and faster implementations where there are any."""

from dfq_kernels.fake_quantize import fake_quantize

__all__ = ["fake_quantize"]

"""Quantization ops: a PyTorch reference each, and faster implementations where there are any."""

from dfq_kernels.batch_norm import batch_norm, batch_norm_statistics
from dfq_kernels.fake_quantize import fake_quantize

__all__ = ["batch_norm", "batch_norm_statistics", "fake_quantize"]

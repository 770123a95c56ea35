"""Quantization ops: a PyTorch reference each, and faster implementations where there are any."""

from dfq_kernels.batch_norm import batch_norm, batch_norm_statistics
from dfq_kernels.fake_quantize import fake_quantize
from dfq_kernels.fake_quantize_all import fake_quantize_all

__all__ = ["batch_norm", "batch_norm_statistics", "fake_quantize", "fake_quantize_all"]

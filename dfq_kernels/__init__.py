"""Quantization ops: a PyTorch reference each, and faster implementations where there are any."""

"""Float model in, trainable fake-quantized student out."""

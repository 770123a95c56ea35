"""csrc/core/requantize.h in Triton: from the sums of an integer layer to its output.

Launch with enable_fp_fusion=False: a product is rounded before anything is added to it.
"""

import triton
import triton.language as tl

from dfq_kernels._triton.arithmetic import ROUNDING_SHIFT, clamp


@triton.jit
def rescale(
    sums, multiplier, bias, residual, residual_multiplier, residual_zero, RELU: tl.constexpr
):
    """The output in float32. ``residual``, int8, may be None; ``bias`` may be 0.0."""
    value = sums.to(tl.float32) * multiplier + bias
    if residual is not None:
        value = value + (residual.to(tl.float32) - residual_zero) * residual_multiplier
    if RELU:
        value = tl.where(value > 0, value, 0.0)
    return value


@triton.jit
def stored(value, grid):
    """int8: the nearest integer, ties to even, plus zero, in low to high; NaN becomes low.

    ``grid`` is zero, an int, and low and high minus zero, as floats within ±2^22.
    """
    zero, low, high = grid
    # the lowest byte of the float is that of the integer: quicker than a conversion
    shifted = clamp(value, low, high) + ROUNDING_SHIFT
    return (shifted.to(tl.int32, bitcast=True) + zero).to(tl.int8)

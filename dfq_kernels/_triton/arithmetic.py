"""csrc/core/arithmetic.h in Triton. Launch with enable_fp_fusion=False: a product is rounded."""

import triton
import triton.language as tl

LARGEST_CODE = tl.constexpr(1048576.0)  # 2^20
ROUNDING_SHIFT = tl.constexpr(12582912.0)  # 1.5 * 2^23: no room for fraction bits


@triton.jit
def clamp(value, low, high):
    """NaN becomes low; no bound may be NaN."""
    raised = tl.where(value > low, value, low)
    return tl.minimum(raised, high)


@triton.jit
def round_half_even(value):
    """To the nearest integer, for \\|value\\| <= 2^22; -0 becomes 0."""
    return (value + ROUNDING_SHIFT) - ROUNDING_SHIFT


@triton.jit
def make_grid(scale, zero_point, quant_min, quant_max):
    """What x must become: inverse and scale, and the bounds of the code minus zero_point."""
    # `/` is approximate on a GPU: triton-lang/triton#10661
    inverse = tl.div_rn(1.0 + tl.zeros_like(scale), scale)
    zero = round_half_even(clamp(zero_point, -LARGEST_CODE, LARGEST_CODE))
    return inverse, scale, quant_min - zero, quant_max - zero


@triton.jit
def fake_quantize(x, grid):
    """The rounded and clamped x; clamped first, so that the rounding sees no large value."""
    inverse, scale, low, high = grid
    return round_half_even(clamp(x * inverse, low, high)) * scale


@triton.jit
def fake_quantize_backward(grad, x, grid):
    """Whether x was inside the bounds, and what it gives to the gradients.

    The latter: its term for scale, and for zero_point (still to be multiplied by -scale).
    """
    inverse, _, low, high = grid
    ratio = x * inverse
    # one level further on each side tells what was clamped; NaN counts as clamped
    rounded = round_half_even(clamp(ratio, low - 1.0, high + 1.0))
    steps = tl.minimum(tl.maximum(rounded, low), high)
    inside = steps == rounded
    return inside, grad * (steps - tl.where(inside, ratio, 0.0)), tl.where(inside, 0.0, grad)


@triton.jit
def four_words(seed, counter):
    """Philox4x32-10 with key ``seed``: words 0 to 3 of each counter, both int64."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    none = tl.zeros_like(low)
    return tl.philox(seed, low, high, none, none)


@triton.jit
def dropped(word, threshold):
    """Whether an element with this word stays as it is."""
    return (word >> 8).to(tl.int32) < threshold

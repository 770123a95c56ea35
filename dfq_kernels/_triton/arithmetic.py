"""csrc/core/arithmetic.h in Triton. Launch with enable_fp_fusion=False: a product is rounded."""

import triton
import triton.language as tl

LARGEST_CODE = tl.constexpr(1048576.0)  # 2^20
BEYOND_CODES = tl.constexpr(4194304.0)  # 2^22: further from 0 than any bound, and still rounded
ROUNDING_SHIFT = tl.constexpr(12582912.0)  # 1.5 * 2^23: no room for fraction bits


@triton.jit
def clamp(value, low, high):
    """NaN becomes low; no bound may be NaN."""
    raised = tl.where(value > low, value, low)
    return tl.minimum(raised, high)


@triton.jit
def round_half_even(value):
    """To the nearest integer, for absolute values up to 2^22; -0 becomes 0."""
    return (value + ROUNDING_SHIFT) - ROUNDING_SHIFT


@triton.jit
def stored(value, low, high, zero):
    """int8: the nearest integer plus ``zero``; ``low`` and ``high`` are bounds without it.

    NaN becomes low. Bounds are integers within ±2^22.
    """
    # the lowest byte of the float is that of the integer: quicker than a conversion
    shifted = clamp(value, low, high) + ROUNDING_SHIFT
    return (shifted.to(tl.int32, bitcast=True) + zero).to(tl.int8)


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
    rounded = round_half_even(clamp(ratio, -BEYOND_CODES, BEYOND_CODES))
    steps = tl.minimum(tl.maximum(rounded, low), high)
    inside = steps == rounded  # NaN counts as clamped
    return inside, grad * (steps - tl.where(inside, ratio, 0.0)), tl.where(inside, 0.0, grad)


@triton.jit
def four_words(seed, counter):
    """Philox4x32-10 with key ``seed``: words 0 to 3 of each counter, all int64 in and uint32 out.

    As tl.philox, with one wide product where that takes the halves of it one by one.
    """
    key = seed.to(tl.uint64)
    key_low, key_high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    a, b = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c, d = tl.zeros_like(a), tl.zeros_like(a)
    for _ in tl.static_range(10):
        first, second = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, b = (second >> 32).to(tl.uint32) ^ b ^ key_low, second.to(tl.uint32)
        c, d = (first >> 32).to(tl.uint32) ^ d ^ key_high, first.to(tl.uint32)
        key_low = tl.add(key_low, 0x9E3779B9, sanitize_overflow=False)
        key_high = tl.add(key_high, 0xBB67AE85, sanitize_overflow=False)
    return a, b, c, d

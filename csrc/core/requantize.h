// From the int32 accumulator of an integer layer to its output. Compile with contraction off: a
// product is rounded before anything is added to it, as PyTorch's own operators do.
#pragma once

#include "core/arithmetic.h"

namespace dfq {

constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23

template <class F>
DFQ_HOST_DEVICE F rescale(F accumulator, F multiplier, F bias) {
  return accumulator * multiplier + bias;
}
// residual minus its zero, an integer, times its scale over that of the output.
template <class F>
DFQ_HOST_DEVICE F add_residual(F value, F residual, F multiplier) {
  return value + residual * multiplier;
}
// With floor = 0 it is ReLU; NaN becomes floor.
template <class F>
DFQ_HOST_DEVICE F at_least(F value, F floor) {
  return where(value > floor, value, floor);
}

// A float whose lowest byte is that of the nearest integer, ties to even, in low .. high. For
// integers within ±2^22; quicker than a conversion, and the same everywhere.
template <class F>
DFQ_HOST_DEVICE F integer_in_low_byte(F value, F low, F high) {
  return clamp(value, low, high) + Splat<F>::of(kRoundingShift);
}

DFQ_HOST_DEVICE int8_t low_byte(float shifted) {
#if defined(__CUDA_ARCH__)
  return static_cast<int8_t>(__float_as_int(shifted));
#else
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  return static_cast<int8_t>(bits);
#endif
}

// The stored integer: the nearest to value, plus the stored zero of the output, in low .. high.
DFQ_HOST_DEVICE int8_t requantize(float value, int32_t zero, int32_t low, int32_t high) {
  const float shifted =
      integer_in_low_byte(value, static_cast<float>(low - zero), static_cast<float>(high - zero));
  return static_cast<int8_t>(low_byte(shifted) + zero);
}

}  // namespace dfq

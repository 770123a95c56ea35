// The arithmetic of quantization, once, for every compiled backend: plain functions that also
// compile as CUDA device code. F is float, or sixteen of them at a time (csrc/cpu/lanes.h).
// Compile with contraction off: x * inverse must be rounded before anything is added to it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DFQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DFQ_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace dfq {

// zero_point is rounded and kept within this, quant_min and quant_max are: then codes minus
// zero_point are below 2^22, where round_half_even is exact.
constexpr float kLargestCode = 1048576.0f;  // 2^20

DFQ_HOST_DEVICE float where(bool condition, float a, float b) { return condition ? a : b; }
template <class F>
struct Splat {
  static DFQ_HOST_DEVICE F of(float value) { return value; }
};

// What x must become: (code - zero_point) * scale with code in quant_min .. quant_max.
template <class F>
struct Grid {
  F inverse;  // 1 / scale, rounded once
  F scale;
  F low;   // quant_min - zero_point
  F high;  // quant_max - zero_point
};

template <class F>
DFQ_HOST_DEVICE F clamp(F value, F low, F high) {  // NaN becomes low
  const F raised = where(value > low, value, low);
  return where(raised < high, raised, high);
}

// To the nearest integer, ties to even, for |value| <= 2^22; -0 becomes 0.
template <class F>
DFQ_HOST_DEVICE F round_half_even(F value) {
  const F shift = Splat<F>::of(12582912.0f);  // 1.5 * 2^23: no room for fraction bits
  return (value + shift) - shift;
}

DFQ_HOST_DEVICE Grid<float> make_grid(float scale, float zero_point, int64_t quant_min,
                                      int64_t quant_max) {
  const float zero = round_half_even(clamp(zero_point, -kLargestCode, kLargestCode));
  return {1.0f / scale, scale, static_cast<float>(quant_min) - zero,
          static_cast<float>(quant_max) - zero};
}

// code - zero_point, an integer. Clamped before it is rounded: the bounds are integers, so the
// result is the same, and the rounding never sees a large value.
template <class F>
DFQ_HOST_DEVICE F quantize(F x, const Grid<F>& grid) {
  return round_half_even(clamp(x * grid.inverse, grid.low, grid.high));
}

template <class F>
DFQ_HOST_DEVICE F fake_quantize(F x, const Grid<F>& grid) {
  return quantize(x, grid) * grid.scale;
}

// What one element gives to the gradients; arXiv:1902.08153 (LSQ), with zero_point learned too.
template <class F>
struct Gradients {
  F x;        // the gradient of x
  F scale;    // its term in the gradient of scale
  F clamped;  // its term in the gradient of zero_point, still to be multiplied by -scale
};

template <class F>
DFQ_HOST_DEVICE Gradients<F> fake_quantize_backward(F grad, F x, const Grid<F>& grid) {
  const F one = Splat<F>::of(1.0f), none = Splat<F>::of(0.0f);
  const F ratio = x * grid.inverse;
  // one level further on each side tells what was clamped; NaN counts as clamped
  const F rounded = round_half_even(clamp(ratio, grid.low - one, grid.high + one));
  const F steps = clamp(rounded, grid.low, grid.high);
  const auto inside = steps == rounded;
  return {where(inside, grad, none), grad * (steps - where(inside, ratio, none)),
          where(inside, none, grad)};
}

// Philox4x32-10 (Salmon et al., SC 2011): four random words of each 128-bit counter.
struct Words4 {
  uint32_t word[4];
};
constexpr uint32_t kPhiloxMultiplier[2] = {0xD2511F53u, 0xCD9E8D57u};
constexpr uint32_t kPhiloxWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};

DFQ_HOST_DEVICE Words4 philox(uint64_t seed, uint64_t counter, uint64_t counter_high = 0) {
  uint32_t a = static_cast<uint32_t>(counter), b = static_cast<uint32_t>(counter >> 32);
  uint32_t c = static_cast<uint32_t>(counter_high);
  uint32_t d = static_cast<uint32_t>(counter_high >> 32);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  constexpr uint32_t kFirst = kPhiloxMultiplier[0], kSecond = kPhiloxMultiplier[1];
  constexpr uint32_t kWeyl0 = kPhiloxWeyl[0], kWeyl1 = kPhiloxWeyl[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = static_cast<uint64_t>(kFirst) * a;
    const uint64_t second = static_cast<uint64_t>(kSecond) * c;
    a = static_cast<uint32_t>(second >> 32) ^ b ^ key0;
    b = static_cast<uint32_t>(second);
    c = static_cast<uint32_t>(first >> 32) ^ d ^ key1;
    d = static_cast<uint32_t>(first);
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return {{a, b, c, d}};
}

// Element i stays float if the upper 24 bits of word i % 4 of counter i / 4 are below this.
DFQ_HOST_DEVICE int32_t drop_threshold(double drop) {
  return static_cast<int32_t>(drop * 16777216.0 + 0.5);
}
DFQ_HOST_DEVICE bool dropped(uint32_t word, int32_t threshold) {
  return static_cast<int32_t>(word >> 8) < threshold;
}

}  // namespace dfq

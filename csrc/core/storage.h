// The types in which tensors are stored. Arithmetic is always float32; these convert.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/arithmetic.h"

namespace dfq {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
DFQ_HOST_DEVICE To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "reinterprets, and converts nothing");
  To result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

DFQ_HOST_DEVICE float to_float(float value) { return value; }
DFQ_HOST_DEVICE float to_float(BFloat16 value) {
  return bits_of<float>(static_cast<uint32_t>(value.bits) << 16);
}
DFQ_HOST_DEVICE float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) {  // infinite or NaN
    return bits_of<float>(sign | magnitude | 0x7f800000u);
  }
  if (magnitude < (1u << 23)) {  // an exponent of 2^-14 and minus 2^-14 again: exact
    return bits_of<float>(sign |
                          bits_of<uint32_t>(bits_of<float>(magnitude + (113u << 23)) - 0x1p-14f));
  }
  return bits_of<float>(sign | (magnitude + (112u << 23)));
#endif
}

// From float32, rounded half to even; NaN stays NaN.
template <class T>
DFQ_HOST_DEVICE T from_float(float value);

template <>
DFQ_HOST_DEVICE float from_float<float>(float value) {
  return value;
}
template <>
DFQ_HOST_DEVICE BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bits_of<uint32_t>(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>(value == value ? rounded >> 16 : 0x7fc0u)};
#endif
}
template <>
DFQ_HOST_DEVICE Half from_float<Half>(float value) {
#if defined(__CUDA_ARCH__)
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  const uint32_t bits = bits_of<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (!(value == value)) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to infinity
    half = 0x7c00u;
  } else if (magnitude < (113u << 23)) {  // 2^-24, the step of denormals, is 0.5f's last bit
    half = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - bits_of<uint32_t>(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(half | sign)};
#endif
}

}  // namespace dfq

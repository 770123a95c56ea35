// Values of 16 bits in memory, float32 in registers. To store rounds half to even; NaN stays NaN.
#pragma once

#include "core/storage.h"
#include "lanes.h"

namespace dfq {

// Sixteen-bit values into the upper halves of words, and back: one permutation each.
template <int W, int... I>
DFQ_INLINE native<uint32_t, W> widen(native<uint16_t, W> a, std::integer_sequence<int, I...>) {
  return (native<uint32_t, W>)__builtin_shufflevector(a, native<uint16_t, W>{},
                                                      (I % 2 ? I / 2 : W)...);
}
template <int W, int... I>
DFQ_INLINE native<uint16_t, W> upper(native<uint32_t, W> a, std::integer_sequence<int, I...>) {
  const auto halves = (native<uint16_t, 2 * W>)a;
  return __builtin_shufflevector(halves, halves, (2 * I + 1)...);
}
template <int N, int W>
DFQ_INLINE void load_upper(const void* from, Block<uint32_t, N, W>& out) {
  if constexpr (N == W) {
    native<uint16_t, W> narrow;
    std::memcpy(&narrow, from, sizeof(narrow));
    out.v = widen<W>(narrow, std::make_integer_sequence<int, 2 * W>());
  } else {
    load_upper(from, out.lo);
    load_upper(static_cast<const uint16_t*>(from) + N / 2, out.hi);
  }
}
template <int N, int W>
DFQ_INLINE void store_upper(void* to, Block<uint32_t, N, W> a) {
  if constexpr (N == W) {
    const auto narrow = upper<W>(a.v, std::make_integer_sequence<int, W>());
    std::memcpy(to, &narrow, sizeof(narrow));
  } else {
    store_upper(to, a.lo);
    store_upper(static_cast<uint16_t*>(to) + N / 2, a.hi);
  }
}

template <int W>
DFQ_INLINE Floats<W> load(const BFloat16* from) {
  Words<W> out;
  load_upper(from, out);
  return bits_as<float>(out);
}
template <int W>
DFQ_INLINE void store(BFloat16* to, Floats<W> a) {
  const auto bits = bits_as<uint32_t>(a);
  const auto odd = shift_right<16>(bits) & words<W>(1);
  store_upper(to, where(a == a, bits + words<W>(0x7fff) + odd, words<W>(0x7fc00000u)));
}

// x86-64-v3 and later convert halves in one instruction. As assembly, because an intrinsic may only
// be inlined into functions that are compiled for it, and these serve every instruction set.
#if defined(__x86_64__)
constexpr int kConverts = 8;  // the least W that has it
#else
constexpr int kConverts = kLanes + 1;
#endif
template <int N, int W>
DFQ_INLINE void convert_from(const Half* from, Block<float, N, W>& out) {
  if constexpr (N == W) {
    native<uint16_t, W> narrow;
    std::memcpy(&narrow, from, sizeof(narrow));
    asm("vcvtph2ps %1, %0" : "=v"(out.v) : "v"(narrow));
  } else {
    convert_from(from, out.lo);
    convert_from(from + N / 2, out.hi);
  }
}
template <int N, int W>
DFQ_INLINE void convert_to(Half* to, Block<float, N, W> a) {
  if constexpr (N == W) {
    native<uint16_t, W> narrow;
    asm("vcvtps2ph $0, %1, %0" : "=v"(narrow) : "v"(a.v));
    std::memcpy(to, &narrow, sizeof(narrow));
  } else {
    convert_to(to, a.lo);
    convert_to(to + N / 2, a.hi);
  }
}
template <int W>
DFQ_INLINE Floats<W> load_half(const Half* from) {
  Words<W> half;
  load_upper(from, half);
  const auto sign = half & words<W>(0x80000000u);
  const auto magnitude = shift_right<3>(half & words<W>(0x7fff0000u));
  const auto normal = magnitude + words<W>(112u << 23);
  // an exponent of 2^-14 and minus 2^-14 again: exact, and no denormal float32 on the way
  const auto tiny = bits_as<float>(magnitude + words<W>(113u << 23)) - floats<W>(0x1p-14f);
  const auto infinite = magnitude | words<W>(0x7f800000u);
  const auto finite = where(magnitude < words<W>(1u << 23), bits_as<uint32_t>(tiny), normal);
  const auto value = where(magnitude < words<W>(0x0f800000u), finite, infinite);
  return bits_as<float>(sign | value);
}

template <int W>
DFQ_INLINE void store_half(Half* to, Floats<W> a) {
  const auto bits = bits_as<uint32_t>(a);
  const auto magnitude = bits & words<W>(0x7fffffffu);
  const auto odd = shift_right<13>(magnitude) & words<W>(1);
  const auto normal = shift_right<13>(magnitude - words<W>(112u << 23) + words<W>(0xfff) + odd);
  // 2^-24, the step of denormal halves, is the last bit of 0.5f
  const auto tiny = bits_as<uint32_t>(bits_as<float>(magnitude) + floats<W>(0.5f)) -
                    bits_as<uint32_t>(floats<W>(0.5f));
  const auto finite = where(magnitude < words<W>(113u << 23), tiny, normal);
  const auto ranged = where(magnitude < words<W>(0x477ff000u), finite, words<W>(0x7c00));
  const auto half = where(a == a, ranged, words<W>(0x7e00));
  const auto sign = shift_right<16>(bits & words<W>(0x80000000u));
  store_upper(to, (half | sign) * words<W>(1u << 16));
}

template <int W>
DFQ_INLINE Floats<W> load(const Half* from) {
  if constexpr (W >= kConverts) {
    Floats<W> out;
    convert_from(from, out);
    return out;
  } else {
    return load_half<W>(from);
  }
}
template <int W>
DFQ_INLINE void store(Half* to, Floats<W> a) {
  if constexpr (W >= kConverts) {
    convert_to(to, a);
  } else {
    store_half(to, a);
  }
}

}  // namespace dfq

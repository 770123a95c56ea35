// Sixteen int8 in memory as sixteen int32 or float32 in registers, and back.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "core/requantize.h"
#include "lanes.h"

namespace dfq {

template <int W>
using Integers = Block<int32_t, kLanes, W>;

#if defined(__x86_64__)
constexpr int kVectorBytes = 8;  // the least W whose instruction set widens bytes
#else
constexpr int kVectorBytes = kLanes + 1;
#endif

// In assembly, because GCC converts one by one, and because an intrinsic may only be inlined into
// functions that are compiled for it.
template <int N, int W>
DFQ_INLINE void load_bytes(const int8_t* from, Block<int32_t, N, W>& out) {
  if constexpr (N == W && W >= kVectorBytes) {
    native<int8_t, 16> narrow = {};
    std::memcpy(&narrow, from, W);
    asm("vpmovsxbd %1, %0" : "=v"(out.v) : "v"(narrow));
  } else if constexpr (N == W) {
    native<int8_t, W> narrow;
    std::memcpy(&narrow, from, sizeof(narrow));
    out.v = __builtin_convertvector(narrow, native<int32_t, W>);
  } else {
    load_bytes(from, out.lo);
    load_bytes(from + N / 2, out.hi);
  }
}
// The lowest byte of each.
template <int W, int... I>
DFQ_INLINE native<uint8_t, W> lowest(native<uint32_t, W> a, std::integer_sequence<int, I...>) {
  if constexpr (W == kLanes) {
    native<uint8_t, W> narrow;
    asm("vpmovdb %1, %0" : "=v"(narrow) : "v"(a));  // Zen 5 is slower with one into memory
    return narrow;
  } else {  // GCC converts these one by one
    const auto bytes = (native<uint8_t, 4 * W>)a;
    return __builtin_shufflevector(bytes, bytes, (4 * I)...);
  }
}
template <int N, int W>
DFQ_INLINE void store_bytes(int8_t* to, Block<uint32_t, N, W> a) {
  if constexpr (N == W) {
    const auto narrow = lowest<W>(a.v, std::make_integer_sequence<int, W>());
    std::memcpy(to, &narrow, sizeof(narrow));
  } else {
    store_bytes(to, a.lo);
    store_bytes(to + N / 2, a.hi);
  }
}

template <int N, int W>
DFQ_INLINE Block<float, N, W> to_floats(Block<int32_t, N, W> a) {
  if constexpr (N == W) {
    return {__builtin_convertvector(a.v, native<float, W>)};
  } else {
    return {to_floats(a.lo), to_floats(a.hi)};
  }
}

// The grid of an int8 output, in every lane.
template <int W>
struct StoredGrid {
  Floats<W> low, high;  // minus the stored zero
  Words<W> zero;

  DFQ_INLINE StoredGrid(int64_t zero_, int64_t low_, int64_t high_)
      : low(floats<W>(static_cast<float>(low_ - zero_))),
        high(floats<W>(static_cast<float>(high_ - zero_))),
        zero(words<W>(static_cast<uint32_t>(zero_))) {}

  DFQ_INLINE void store(int8_t* to, Floats<W> value) const {
    store_bytes(to, bits_as<uint32_t>(integer_in_low_byte(value, low, high)) + zero);
  }
};

}  // namespace dfq

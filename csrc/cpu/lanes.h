// Sixteen float32 at a time, in GNU vectors as wide as the instruction set has them.
// There are sixteen lanes everywhere, so sums over lanes have the same bits on every machine.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "core/arithmetic.h"

#define DFQ_INLINE inline __attribute__((always_inline))

namespace dfq {

constexpr int kLanes = 16;

template <class T, int N>
struct Native {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N>
using native = typename Native<T, N>::type;

// N values of T in native vectors of W. A tree and not an array: it stays in registers.
template <class T, int N, int W>
struct Block {
  Block<T, N / 2, W> lo, hi;
};
template <class T, int W>
struct Block<T, W, W> {
  native<T, W> v;
};

template <int W>
using Floats = Block<float, kLanes, W>;
template <int W>
using Words = Block<uint32_t, kLanes, W>;
template <int W>
using Mask = Block<int32_t, kLanes, W>;  // what a comparison gives; pass it straight to where()

#define DFQ_OPERATOR(op, Result)                                                   \
  template <class T, int N, int W>                                                 \
  DFQ_INLINE Block<Result, N, W> operator op(Block<T, N, W> a, Block<T, N, W> b) { \
    if constexpr (N == W) {                                                        \
      return {(native<Result, W>)(a.v op b.v)};                                    \
    } else {                                                                       \
      return {a.lo op b.lo, a.hi op b.hi};                                         \
    }                                                                              \
  }
DFQ_OPERATOR(+, T)
DFQ_OPERATOR(-, T)
DFQ_OPERATOR(*, T)
DFQ_OPERATOR(&, T)
DFQ_OPERATOR(|, T)
DFQ_OPERATOR(^, T)
DFQ_OPERATOR(<, int32_t)
DFQ_OPERATOR(>, int32_t)
DFQ_OPERATOR(==, int32_t)
#undef DFQ_OPERATOR

// The same value in every lane. Unless it is a constant do this before a loop, not in it: GCC
// builds it in memory.
template <class T, int N, int W>
DFQ_INLINE void fill(Block<T, N, W>& out, T value) {
  if constexpr (N == W) {
    out.v = value - native<T, W>{};  // minus, not plus: it keeps -0
  } else {
    fill(out.lo, value);
    out.hi = out.lo;
  }
}
template <int W>
DFQ_INLINE Floats<W> floats(float value) {
  Floats<W> out;
  fill(out, value);
  return out;
}
template <int W>
DFQ_INLINE Words<W> words(uint32_t value) {
  Words<W> out;
  fill(out, value);
  return out;
}
template <int W>
struct Splat<Block<float, kLanes, W>> {  // core/arithmetic.h asks for its constants here
  static DFQ_INLINE Floats<W> of(float value) { return floats<W>(value); }
};

template <class T, int N, int W>
DFQ_INLINE Block<T, N, W> where(Block<int32_t, N, W> mask, Block<T, N, W> a, Block<T, N, W> b) {
  if constexpr (N == W) {
    return {mask.v ? a.v : b.v};
  } else {
    return {where(mask.lo, a.lo, b.lo), where(mask.hi, a.hi, b.hi)};
  }
}

template <int Bits, int N, int W>
DFQ_INLINE Block<uint32_t, N, W> shift_right(Block<uint32_t, N, W> a) {
  if constexpr (N == W) {
    return {a.v >> Bits};
  } else {
    return {shift_right<Bits>(a.lo), shift_right<Bits>(a.hi)};
  }
}

// The same bits as another type of the same size.
template <class To, class T, int N, int W>
DFQ_INLINE Block<To, N, W> bits_as(Block<T, N, W> a) {
  static_assert(sizeof(To) == sizeof(T));
  if constexpr (N == W) {
    return {(native<To, W>)a.v};
  } else {
    return {bits_as<To>(a.lo), bits_as<To>(a.hi)};
  }
}

template <class T, int N, int W>
DFQ_INLINE void load_plain(const T* from, Block<T, N, W>& out) {
  if constexpr (N == W) {
    std::memcpy(&out.v, from, sizeof(out.v));
  } else {
    load_plain(from, out.lo);
    load_plain(from + N / 2, out.hi);
  }
}
template <class T, int N, int W>
DFQ_INLINE void store_plain(T* to, Block<T, N, W> a) {
  if constexpr (N == W) {
    std::memcpy(to, &a.v, sizeof(a.v));
  } else {
    store_plain(to, a.lo);
    store_plain(to + N / 2, a.hi);
  }
}

template <int W>
DFQ_INLINE Floats<W> load(const float* from) {
  Floats<W> out;
  load_plain(from, out);
  return out;
}
template <int W>
DFQ_INLINE void store(float* to, Floats<W> a) {
  store_plain(to, a);
}
// Lanes first .. 15 as all ones, the others as 0; first is 0 to 16.
template <int W>
DFQ_INLINE Words<W> lanes_from(int64_t first) {
  constexpr uint32_t kOnes = 0xffffffffu;
  static constexpr uint32_t kSteps[2 * kLanes] = {
      0,     0,     0,     0,     0,     0,     0,     0,     0,     0,     0,
      0,     0,     0,     0,     0,     kOnes, kOnes, kOnes, kOnes, kOnes, kOnes,
      kOnes, kOnes, kOnes, kOnes, kOnes, kOnes, kOnes, kOnes, kOnes, kOnes};
  Words<W> out;
  load_plain(kSteps + kLanes - first, out);
  return out;
}
template <int W>
DFQ_INLINE Words<W> load_words(const uint32_t* from) {
  Words<W> out;
  load_plain(from, out);
  return out;
}
// a where the mask is all ones, b where it is 0.
template <int W>
DFQ_INLINE Floats<W> blend(Words<W> mask, Floats<W> a, Floats<W> b) {
  const auto ones = words<W>(0xffffffffu);
  return bits_as<float>((bits_as<uint32_t>(a) & mask) | (bits_as<uint32_t>(b) & (mask ^ ones)));
}
// a where the mask is all ones, else 0.
template <int W>
DFQ_INLINE Floats<W> only(Words<W> mask, Floats<W> a) {
  return bits_as<float>(bits_as<uint32_t>(a) & mask);
}

// The sum of the lanes, always added in the same order: neighbours 8 apart, 4 apart, 2, 1.
template <class T, int N, int W>
DFQ_INLINE T sum(Block<T, N, W> a) {
  if constexpr (N == W) {
    T lanes[N];
    store_plain(lanes, a);
    for (int width = N / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) {
        lanes[i] += lanes[i + width];
      }
    }
    return lanes[0];
  } else {
    return sum(a.lo + a.hi);
  }
}

}  // namespace dfq

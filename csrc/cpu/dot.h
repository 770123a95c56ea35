// Dot products of four uint8 with four int8 in each 32-bit lane, exact on every instruction set.
//
// run_dot<Kernel>(args...) is Kernel::run<Dot>(args...), compiled once for each way to do it and
// chosen at run time. As for run<> in common.h, all that it calls must be DFQ_INLINE.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common.h"
#include "lanes.h"

// Instructions are written as asm: a function with an intrinsic could not be inlined into one that
// is compiled for several targets. Clang refuses that for asm too and takes the portable code.
#if defined(__x86_64__) && !defined(__clang__)
#define DFQ_X86_ASM 1
#endif

namespace dfq {

// The four bytes at `from` in every lane.
template <int W>
DFQ_INLINE native<int32_t, W> broadcast(const void* from) {
  native<int32_t, W> out;
#ifdef DFQ_X86_ASM
  if constexpr (W > 4) {
    asm("vpbroadcastd %1, %0" : "=v"(out) : "m"(*static_cast<const int32_t(*)>(from)));
    return out;
  }
#endif
  int32_t word;
  std::memcpy(&word, from, sizeof(word));
  out = word - native<int32_t, W>{};
  return out;
}

// a * b + c * d of the int16 pairs (a, c) and (b, d) in each lane.
template <int W>
DFQ_INLINE native<int32_t, W> multiply_pairs(native<int32_t, W> a, native<int32_t, W> b) {
#ifdef DFQ_X86_ASM
  if constexpr (W > 4) {
    native<int32_t, W> out;
    asm("vpmaddwd %2, %1, %0" : "=v"(out) : "v"(a), "v"(b));
    return out;
  } else {
    asm("pmaddwd %1, %0" : "+x"(a) : "x"(b));
    return a;
  }
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// A way to dot products: Sums are sixteen of them, Weights four int8 for each, and a Pixel four
// uint8 for all; add_lanes takes four uint8 for each, from memory.
#ifdef DFQ_X86_ASM
struct Vnni {
  static constexpr int W = 16;

  struct Pixel {
    native<int32_t, W> bytes;
    DFQ_INLINE explicit Pixel(const void* from) : bytes(broadcast<W>(from)) {}
  };
  struct Weights {
    native<int32_t, W> bytes;
    DFQ_INLINE explicit Weights(const int8_t* from) { std::memcpy(&bytes, from, sizeof(bytes)); }
  };
  using Sums = native<int32_t, W>;  // bare: GCC keeps some structs of one vector in memory

  static DFQ_INLINE void load(const int32_t* from, Sums& sums) {
    std::memcpy(&sums, from, sizeof(sums));
  }
  static DFQ_INLINE void store(int32_t* to, Sums sums) { std::memcpy(to, &sums, sizeof(sums)); }
  static DFQ_INLINE Sums add(Sums sums, const Pixel& pixel, const Weights& weights) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(pixel.bytes), "v"(weights.bytes));
    return sums;
  }
  static DFQ_INLINE Sums add_lanes(Sums sums, const uint8_t* lanes, const Weights& weights) {
    native<int32_t, W> bytes;
    std::memcpy(&bytes, lanes, sizeof(bytes));
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(weights.bytes));
    return sums;
  }
};
#endif

template <int kWidth>
struct Pairs {
  static constexpr int W = kWidth;
  static constexpr int kVectors = kLanes / W;
  using Vector = native<int32_t, W>;

  struct Pixel {
    Vector even, odd;  // of the four bytes, as pairs of int16
    DFQ_INLINE explicit Pixel(const void* from) : Pixel(broadcast<W>(from)) {}
    DFQ_INLINE explicit Pixel(Vector bytes)
        : even(bytes & 0x00ff00ff), odd((Vector)((native<uint32_t, W>)bytes >> 8) & 0x00ff00ff) {}
  };
  struct Weights {
    Vector even[kVectors], odd[kVectors];
    DFQ_INLINE explicit Weights(const int8_t* from) {
#pragma GCC unroll 4
      for (int i = 0; i < kVectors; ++i) {
        native<int16_t, 2 * W> bytes;
        std::memcpy(&bytes, from + i * sizeof(bytes), sizeof(bytes));
        even[i] = (Vector)((bytes << 8) >> 8);
        odd[i] = (Vector)(bytes >> 8);
      }
    }
  };
  struct Sums {
    Vector v[kVectors];
  };

  static DFQ_INLINE void load(const int32_t* from, Sums& sums) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      std::memcpy(&sums.v[i], from + i * W, sizeof(Vector));
    }
  }
  static DFQ_INLINE void store(int32_t* to, const Sums& sums) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      std::memcpy(to + i * W, &sums.v[i], sizeof(Vector));
    }
  }
  static DFQ_INLINE Sums add(Sums sums, const Pixel& pixel, const Weights& weights) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      sums.v[i] += multiply_pairs<W>(pixel.even, weights.even[i]);
      sums.v[i] += multiply_pairs<W>(pixel.odd, weights.odd[i]);
    }
    return sums;
  }
  static DFQ_INLINE Sums add_lanes(Sums sums, const uint8_t* lanes, const Weights& weights) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; ++i) {
      Vector bytes;
      std::memcpy(&bytes, lanes + i * sizeof(bytes), sizeof(bytes));
      const Pixel pixels(bytes);
      sums.v[i] += multiply_pairs<W>(pixels.even, weights.even[i]);
      sums.v[i] += multiply_pairs<W>(pixels.odd, weights.odd[i]);
    }
    return sums;
  }
};

#if defined(DFQ_X86_ASM) && !defined(DFQ_ONE_ISA)
#define DFQ_TARGET(arch) __attribute__((target(arch), noinline))

template <class Kernel, class... Args>
DFQ_TARGET("arch=x86-64-v4,avx512vnni,prefer-vector-width=512")
void run_vnni(Args... args) {
  Kernel::template run<Vnni>(args...);
}
template <class Kernel, class... Args>
DFQ_TARGET("arch=x86-64-v4,prefer-vector-width=512")
void run_pairs_v4(Args... args) {
  Kernel::template run<Pairs<16>>(args...);
}
template <class Kernel, class... Args>
DFQ_TARGET("arch=x86-64-v3")
void run_pairs_v3(Args... args) {
  Kernel::template run<Pairs<8>>(args...);
}
#undef DFQ_TARGET

// Whether the processor has it, and DFQ_ISA does not ask for less; v4 has no VNNI.
inline bool has_vnni() {
  static const bool has = __builtin_cpu_supports("avx512vnni") && instruction_set() == 4 &&
                          std::getenv("DFQ_ISA") == nullptr;
  return has;
}

template <class Kernel, class... Args>
void run_dot(Args... args) {
  if (has_vnni()) {
    return run_vnni<Kernel>(args...);
  }
  switch (instruction_set()) {
    case 4:
      return run_pairs_v4<Kernel>(args...);
    case 3:
      return run_pairs_v3<Kernel>(args...);
    default:
      return Kernel::template run<Pairs<4>>(args...);
  }
}
#else
template <class Kernel, class... Args>
void run_dot(Args... args) {
  Kernel::template run<Pairs<4>>(args...);
}
#endif

}  // namespace dfq

// The tile of the output that a block of threads computes, and the products in it.
#pragma once

#include "tensor_cores.h"

namespace dfq {

// How wide what is stored is along K: int8, or two integers of 4 bits a byte.
template <bool kPackedX_, bool kPackedWeight_, bool kVectors_, int kWarpColumns_>
struct Tile {
  static constexpr bool kPackedX = kPackedX_, kPackedWeight = kPackedWeight_, kVectors = kVectors_;

  // Of a warp, in products.
  static constexpr int kHigh = 2, kWide = 8;
  static constexpr int kWarpRows = 4, kWarpColumns = kWarpColumns_;
  static constexpr int kThreads = kWarpRows * kWarpColumns * kWarp;
  static constexpr int kRowsOfWarp = kHigh * kProductRows;
  static constexpr int kColumnsOfWarp = kWide * kProductColumns;
  static constexpr int kRows = kWarpRows * kRowsOfWarp;
  static constexpr int kColumns = kWarpColumns * kColumnsOfWarp;

  // Of a step along K, in blocks of 64 integers, and as segments of a row.
  static constexpr int kBlocks = kPackedX && kPackedWeight ? 2 : 1;
  static constexpr int kK = kBlocks * static_cast<int>(kPackBlock);
  static constexpr int kXBlock = kPackedX ? 2 : 4, kWeightBlock = kPackedWeight ? 2 : 4;
  static constexpr int kXSegments = kBlocks * kXBlock;
  static constexpr int kWeightSegments = kBlocks * kWeightBlock;
  static constexpr int kXSlots = kRows * kXSegments;
  static constexpr int kStageSlots = kXSlots + kColumns * kWeightSegments;

  using Sums = int32_t[kHigh][kWide][4];

  // Unpacked integers are 16 times as large.
  DFQ_DEVICE static bool int4_products() {
    return kPackedX && kPackedWeight && multiplies_int4(architecture());
  }
  DFQ_DEVICE static int shift() {
    return int4_products() ? 0 : (kPackedX ? 4 : 0) + (kPackedWeight ? 4 : 0);
  }
};

// Words of 32 int8 along K: half of a block of 64, from words as they are stored.
template <bool kPacked>
struct Half64 {
  DFQ_DEVICE static int segment(int half) { return kPacked ? 0 : half * 2; }
  DFQ_DEVICE static uint32_t of(uint32_t word, int half) {
    return !kPacked ? word : half ? upper_nibbles_times_16(word) : lower_nibbles_times_16(word);
  }
};

// The segments that a lane names, in a tile with `kSegments` a row.
template <int kSegments>
class Named {
 public:
  DFQ_DEVICE explicit Named(Segment first)
      : row_(first.row * kSegments),
        within_(slot_of_segment(first.row, first.index, kSegments) - row_) {}

  // `rows` further down, a multiple of eight, and `segments` further on, of two.
  DFQ_DEVICE int slot(int rows, int segments) const {
    return row_ + rows * kSegments + (within_ ^ segments);
  }

 private:
  int row_, within_;
};

// Adds a warp's products of a step. `x` and `weight` are the tiles in shared memory.
template <class T>
class Products {
 public:
  DFQ_DEVICE Products()
      : x_(below(segment_of_a(lane()), warp() / T::kWarpColumns * T::kRowsOfWarp)),
        weight_(below(segment_of_b(lane()), warp() % T::kWarpColumns * T::kColumnsOfWarp)) {}

  DFQ_DEVICE void add(typename T::Sums& sums, const uint4* x, const uint4* weight) const {
    if (T::int4_products()) {
#pragma unroll
      for (int block = 0; block < T::kBlocks; ++block) {
        add_int4(sums, x, weight, block);
      }
    } else {
      DFQ_ROLLED  // unrolled it would take too many registers
          for (int block = 0; block < T::kBlocks; ++block) {
        add_int8(sums, x, weight, block);
      }
    }
  }

 private:
  DFQ_DEVICE static int lane() { return static_cast<int>(threadIdx.x % kWarp); }
  DFQ_DEVICE static int warp() { return static_cast<int>(threadIdx.x / kWarp); }
  DFQ_DEVICE static Segment below(Segment segment, int rows) {
    return {segment.row + rows, segment.index};
  }

  // `pair` is of two products, sixteen columns.
  DFQ_DEVICE void load_x(uint32_t (&words)[4], const uint4* x, int high, int segment) const {
    load_words(words, x + x_.slot(high * kProductRows, segment));
  }
  DFQ_DEVICE void load_weight(uint32_t (&words)[4], const uint4* weight, int pair,
                              int segment) const {
    load_words(words, weight + weight_.slot(pair * 2 * kProductColumns, segment));
  }

  template <bool kInt4>
  DFQ_DEVICE static void multiply_pair(typename T::Sums& sums, int pair,
                                       const uint32_t (&a)[T::kHigh][4], const uint32_t (&b)[4]) {
#pragma unroll
    for (int high = 0; high < T::kHigh; ++high) {
      multiply<kInt4>(sums[high][2 * pair], a[high], b[0], b[1]);
      multiply<kInt4>(sums[high][2 * pair + 1], a[high], b[2], b[3]);
    }
  }

  DFQ_DEVICE void add_int4(typename T::Sums& sums, const uint4* x, const uint4* weight,
                           int block) const {
    uint32_t a[T::kHigh][4], b[4];
#pragma unroll
    for (int high = 0; high < T::kHigh; ++high) {
      load_x(a[high], x, high, block * T::kXBlock);
    }
#pragma unroll
    for (int pair = 0; pair < T::kWide / 2; ++pair) {
      load_weight(b, weight, pair, block * T::kWeightBlock);
      multiply_pair<true>(sums, pair, a, b);
    }
  }

  DFQ_DEVICE void add_int8(typename T::Sums& sums, const uint4* x, const uint4* weight,
                           int block) const {
    using OfX = Half64<T::kPackedX>;
    using OfWeight = Half64<T::kPackedWeight>;
    uint32_t a[2][T::kHigh][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int high = 0; high < T::kHigh; ++high) {
        // of packed ones the compiler keeps the first load
        load_x(a[half][high], x, high, block * T::kXBlock + OfX::segment(half));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[half][high][i] = OfX::of(a[half][high][i], half);
        }
      }
    }
#pragma unroll
    for (int pair = 0; pair < T::kWide / 2; ++pair) {
      uint32_t stored[4], b[4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half == 0 || !T::kPackedWeight) {
          load_weight(stored, weight, pair, block * T::kWeightBlock + OfWeight::segment(half));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          b[i] = OfWeight::of(stored[i], half);
        }
        multiply_pair<false>(sums, pair, a[half], b);
      }
    }
  }

  Named<T::kXSegments> x_;
  Named<T::kWeightSegments> weight_;
};

// The sum of a row's integers in a step, of packed ones times 16.
template <bool kPacked, int kSegments>
DFQ_DEVICE int32_t sum_of_row(const uint4* tile, int row) {
  constexpr uint32_t kOnes = 0x01010101u;
  int32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kSegments; ++i) {
    const uint4 segment = tile[slot_of_segment(row, i, kSegments)];
    for (const uint32_t word : {segment.x, segment.y, segment.z, segment.w}) {
      sum = dot_int8(Half64<kPacked>::of(word, 0), kOnes, sum);
      if constexpr (kPacked) {
        sum = dot_int8(Half64<kPacked>::of(word, 1), kOnes, sum);
      }
    }
  }
  return sum;
}

}  // namespace dfq

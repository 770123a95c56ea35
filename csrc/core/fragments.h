// What a warp's tensor core multiplies, and which lane holds what of it. A product (mma.sync.m16n8)
// is of sixteen rows of A and eight columns of B, each 32 bytes along K, which are 32 int8 or 64
// integers of 4 bits. A lane holds four words of A, two of B and four of the sums; the sums of a
// word do not depend on the order of the integers in K, only on A and B having the same one.
#pragma once

#include <cstdint>

#include "core/nibbles.h"

namespace dfq {

constexpr int kWarp = 32;  // lanes
constexpr int kProductRows = 16, kProductColumns = 8, kProductBytes = 32;
constexpr int kSegment = 16;  // bytes that are moved at a time

// Four bytes of a row of A or of a column of B.
struct Word {
  int row, byte;
};
DFQ_HOST_DEVICE Word word_of_a(int lane, int index) {
  return {lane / 4 + index % 2 * 8, lane % 4 * 4 + index / 2 * kSegment};
}
DFQ_HOST_DEVICE Word word_of_b(int lane, int index) {
  return {lane / 4, lane % 4 * 4 + index * kSegment};
}
// Where a sum of a lane stands in the product.
struct Cell {
  int row, column;
};
DFQ_HOST_DEVICE Cell cell_of_sum(int lane, int index) {
  return {lane / 4 + index / 2 * 8, lane % 4 * 2 + index % 2};
}

// ldmatrix.x4: each lane names a segment, and gets as its word `index` the one at lane % 4 of the
// segment that lane `namer(lane, index)` has named.
DFQ_HOST_DEVICE int namer(int lane, int index) { return index * 8 + lane / 4; }
// The segments to name for the words of A, and for those of two Bs, one after the other.
struct Segment {
  int row, index;
};
DFQ_HOST_DEVICE Segment segment_of_a(int lane) { return {lane % 16, lane / 16}; }
DFQ_HOST_DEVICE Segment segment_of_b(int lane) { return {lane / 16 * 8 + lane % 8, lane / 8 % 2}; }

// Where a segment lies in shared memory, among rows of `segments` (2, 4 or 8): eight successive
// rows have the same segment in different banks. What is added to the index does not matter here,
// since it is the same in all rows; so slots of segments two apart differ in one bit.
DFQ_HOST_DEVICE int slot_of_segment(int row, int index, int segments) {
  const auto turn = static_cast<unsigned>(row) / (8u / static_cast<unsigned>(segments));
  return row * segments + (index ^ static_cast<int>(turn % static_cast<unsigned>(segments)));
}

// The sum of the products of four int8, or of eight integers of 4 bits.
DFQ_HOST_DEVICE int32_t dot_int8(uint32_t a, uint32_t b, int32_t sum) {
#if defined(__CUDA_ARCH__)
  return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
#else
  for (int shift = 0; shift < 32; shift += 8) {
    sum += static_cast<int8_t>(a >> shift) * static_cast<int8_t>(b >> shift);
  }
  return sum;
#endif
}
DFQ_HOST_DEVICE int32_t dot_int4(uint32_t a, uint32_t b, int32_t sum) {
  const int32_t lower = dot_int8(lower_nibbles_times_16(a), lower_nibbles_times_16(b), 0);
  const int32_t upper = dot_int8(upper_nibbles_times_16(a), upper_nibbles_times_16(b), 0);
  return sum + (lower + upper) / 256;
}

// What a lane gives to a product.
struct Fragments {
  uint32_t a[4], b[2];
};

// A sum of the product from all lanes' fragments, as a GPU computes it: for tests without one.
template <bool kInt4>
int32_t product(const Fragments* warp, Cell cell) {
  int32_t sum = 0;
  for (int byte = 0; byte < kProductBytes; byte += 4) {
    const int within = byte % kSegment / 4, segment = byte / kSegment;
    const uint32_t a = warp[cell.row % 8 * 4 + within].a[segment * 2 + cell.row / 8];
    const uint32_t b = warp[cell.column * 4 + within].b[segment];
    sum = kInt4 ? dot_int4(a, b, sum) : dot_int8(a, b, sum);
  }
  return sum;
}

}  // namespace dfq

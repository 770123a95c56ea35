// From the memory of x and of the weights to tiles in shared memory, in segments of 16 bytes.
#pragma once

#include "integer_gemm.h"
#include "tensor_cores.h"

namespace dfq {

// Sixteen bytes, one by one. They are pushed in from one end: a register has no index.
template <class F>
DFQ_DEVICE uint4 gather_bytes(const F& byte) {
  uint64_t low = 0, high = 0;
  DFQ_ROLLED
  for (int i = 0; i < kSegment; ++i) {
    low = low >> 8 | high << 56;
    high = high >> 8 | static_cast<uint64_t>(static_cast<uint8_t>(byte(i))) << 56;
  }
  return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
          static_cast<uint32_t>(high >> 32)};
}

// The rows of x that windows make. Beyond the border of an image stands x_zero.
struct WindowSource {
  using Row = Windows::Corner;
  const Windows& windows;
  const uint8_t* x;
  int64_t rows;
  int32_t row_bytes;
  uint8_t filler;  // x_zero, as it is stored

  DFQ_DEVICE WindowSource(const IntegerLayer& layer, int64_t group)
      : windows(layer.windows),
        x(layer.x + group * layer.windows.tap_bytes),
        rows(layer.output.rows),
        row_bytes(layer.row_bytes),
        filler(layer.x_packed ? pack_nibbles(layer.x_zero, layer.x_zero)
                              : static_cast<uint8_t>(layer.x_zero)) {}

  DFQ_DEVICE Row row(int64_t index) const {
    return index < rows ? windows.corner(index) : Windows::nowhere();
  }
  // Byte k of rows, and the segment that begins there.
  struct Reader {
    const WindowSource& from;
    Windows::Step step;
    bool there;
    uint32_t fill;  // what stands beyond the border, in all bytes

    DFQ_DEVICE bool inside(const Row& row) const { return there && from.windows.inside(row, step); }
    DFQ_DEVICE const uint8_t* address(const Row& row) const {
      return from.x + (row.offset + step.offset);
    }
  };
  DFQ_DEVICE Reader at(int32_t k) const {
    const bool there = k < row_bytes;
    return {*this, windows.step(k), there, there ? filler * 0x01010101u : 0};
  }
};

// The rows of the weights.
struct WeightSource {
  using Row = const uint8_t*;
  const uint8_t* weight;
  int32_t rows, row_bytes;

  DFQ_DEVICE WeightSource(const IntegerLayer& layer, int64_t group)
      : weight(layer.weight + group * layer.group_channels * layer.weight_row_bytes),
        rows(layer.group_channels),
        row_bytes(layer.weight_row_bytes) {}

  DFQ_DEVICE Row row(int64_t index) const {
    return index < rows ? weight + index * row_bytes : nullptr;
  }
  struct Reader {
    int32_t k;
    bool there;
    static constexpr uint32_t fill = 0;

    DFQ_DEVICE bool inside(const Row& row) const { return there && row; }
    DFQ_DEVICE const uint8_t* address(const Row& row) const { return row + k; }
  };
  DFQ_DEVICE Reader at(int32_t k) const { return {k, k < row_bytes}; }
};

// The part of a thread in filling tiles of `kRows` rows: one segment of every few of them. What is
// not copied asynchronously passes through registers, and waits there while others are multiplied.
template <class Source, int kRows, int kSegments, int kThreads, bool kVectors>
class Loader {
 public:
  static constexpr int kApart = kThreads / kSegments, kEach = kRows / kApart;
  static constexpr int kStepBytes = kSegments * kSegment;
  static_assert(kApart % 8 == 0 && kEach * kApart == kRows, "the same place in a row each time");

  DFQ_DEVICE Loader(const Source& source, int64_t first) : source_(source) {
    const int row = static_cast<int>(threadIdx.x) / kSegments;
    const int segment = static_cast<int>(threadIdx.x) % kSegments;
    k_ = segment * kSegment;
    slot_ = slot_of_segment(row, segment, kSegments);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      rows_[i] = source.row(first + row + i * kApart);
    }
  }

  DFQ_DEVICE void begin(uint4* tile, int32_t step) {
    const int32_t k = k_ + step * kStepBytes;
    if constexpr (kVectors) {
      const auto reader = source_.at(k);
      const uint4 fill = {reader.fill, reader.fill, reader.fill, reader.fill};
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const bool inside = reader.inside(rows_[i]);
        const uint8_t* from = reader.address(rows_[i]);
        if (!copies_asynchronously(architecture())) {
          held_[i] = inside ? load_vector(from) : fill;
        } else if (inside) {
          copy_asynchronously(tile + slot(i), from);
        } else {
          tile[slot(i)] = fill;
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        held_[i] = gather_bytes([&](int byte) {
          const auto reader = source_.at(k + byte);
          return reader.inside(rows_[i]) ? *reader.address(rows_[i]) : reader.fill;
        });
      }
    }
  }
  DFQ_DEVICE void end(uint4* tile) const {
    if (!kVectors || !copies_asynchronously(architecture())) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        tile[slot(i)] = held_[i];
      }
    }
  }

 private:
  DFQ_DEVICE int slot(int i) const { return slot_ + i * kApart * kSegments; }

  Source source_;
  typename Source::Row rows_[kEach];
  uint4 held_[kEach];
  int32_t k_;
  int slot_;
};

}  // namespace dfq

// From the sums of a warp to outputs. They change hands in shared memory, sixteen rows at a time:
// then each lane has four neighbouring channels, the same ones of every row.
#pragma once

#include "core/requantize.h"
#include "integer_gemm.h"
#include "tensor_cores.h"

namespace dfq {

constexpr int kFour = 4;  // channels of a lane

DFQ_DEVICE uint32_t load_word(const uint8_t* from) {
  DFQ_ASSERT_ALIGNED(from, 4);
  return *reinterpret_cast<const uint32_t*>(from);
}
DFQ_DEVICE void store_word(uint8_t* to, uint32_t word) {
  DFQ_ASSERT_ALIGNED(to, 4);
  *reinterpret_cast<uint32_t*>(to) = word;
}

// What is subtracted from sums because integers other than 0 stand for real zero.
struct Corrections {
  const int32_t* of_rows;     // the sum of x - x_zero: times the zero of the weights
  const int32_t* of_columns;  // x_zero times the sum of the weights
};

class FourChannels {
 public:
  // `count` of the four are there; `first` is the first among all, `column` in the block's tile.
  DFQ_DEVICE FourChannels(const IntegerLayer& layer, int64_t first, int count,
                          const int32_t* correction)
      : out_(layer.output), first_(first), count_(count) {
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      const bool there = i < count;
      multiplier_[i] = there ? out_.multiplier.at(first + i) : 0;
      bias_[i] = there ? out_.bias.at(first + i) : 0;
      zero_[i] = there ? layer.weight_zero.at(first + i) : 0;
      correction_[i] = correction[i];
    }
  }

  // `sums` are exact but for the corrections; computed with wrapping, as is what they lead to.
  DFQ_DEVICE void finish(int64_t row, const int32_t (&sums)[kFour], int32_t row_sum) const {
    const bool there = row < out_.rows;
    float values[kFour];
    uint32_t added = there && out_.residual ? load_residual(row) : 0;
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      const uint32_t sum = static_cast<uint32_t>(sums[i]) - static_cast<uint32_t>(correction_[i]) -
                           static_cast<uint32_t>(zero_[i]) * static_cast<uint32_t>(row_sum);
      values[i] = rescale(static_cast<float>(static_cast<int32_t>(sum)), multiplier_[i], bias_[i]);
      if (out_.residual) {
        const int32_t residual = static_cast<int8_t>(added) - out_.residual_zero;
        values[i] = add_residual(values[i], static_cast<float>(residual), out_.residual_multiplier);
        added >>= 8;
      }
      values[i] = out_.relu ? at_least(values[i], 0.0f) : values[i];
    }
    store(row, there, values);
  }

 private:
  // Packed channels: a byte has one of the first and one of the second half of 64.
  DFQ_DEVICE int64_t packed_at(int64_t row) const {
    return row * (out_.channels / 2) + packed_byte(first_);
  }
  DFQ_DEVICE int64_t at(int64_t row) const { return row * out_.channels + first_; }

  // The four stored integers as bytes of a word.
  DFQ_DEVICE uint32_t load_residual(int64_t row) const {
    const auto* residual = static_cast<const uint8_t*>(out_.residual);
    if (!out_.residual_packed) {
      return load_bytes(residual + at(row));
    }
    const uint32_t word = load_bytes(residual + packed_at(row));
    uint32_t integers = 0;
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      const auto byte = static_cast<uint8_t>(word >> 8 * i);
      const int8_t integer = unpack_nibble(byte, packed_in_upper(first_));
      integers |= static_cast<uint32_t>(static_cast<uint8_t>(integer)) << 8 * i;
    }
    return integers;
  }
  DFQ_DEVICE uint32_t load_bytes(const uint8_t* from) const {
    if (out_.fours) {
      return count_ ? load_word(from) : 0;
    }
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      word |= i < count_ ? static_cast<uint32_t>(from[i]) << 8 * i : 0;
    }
    return word;
  }

  DFQ_DEVICE void store(int64_t row, bool there, const float (&values)[kFour]) const {
    if (out_.kind == OutputKind::kFloat) {
      if (there) {
        store_floats(static_cast<float*>(out_.y) + at(row), values);
      }
      return;
    }
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      const int8_t integer = requantize(values[i], out_.zero, out_.low, out_.high);
      word |= static_cast<uint32_t>(static_cast<uint8_t>(integer)) << 8 * i;
    }
    auto* y = static_cast<uint8_t*>(out_.y);
    if (out_.kind == OutputKind::kInt8) {
      if (there) {
        store_bytes(y + at(row), word);
      }
      return;
    }
    // 32 channels are those of eight lanes
    const uint32_t other = __shfl_xor_sync(~0u, word, 8);
    if (there && count_ && !packed_in_upper(first_)) {
      store_word(y + packed_at(row), (word & 0x0f0f0f0fu) | upper_nibbles_times_16(other << 4));
    }
  }

  DFQ_DEVICE void store_floats(float* to, const float (&values)[kFour]) const {
    if (out_.fours) {
      if (count_) {
        store_vector(to, pack<float>(values));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      if (i < count_) {
        to[i] = values[i];
      }
    }
  }
  DFQ_DEVICE void store_bytes(uint8_t* to, uint32_t word) const {
    if (out_.fours) {
      if (count_) {
        store_word(to, word);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      if (i < count_) {
        to[i] = static_cast<uint8_t>(word >> 8 * i);
      }
    }
  }

  const IntegerOutput& out_;
  int64_t first_;
  int count_;
  float multiplier_[kFour], bias_[kFour];
  int32_t zero_[kFour], correction_[kFour];
};

// A warp's room in shared memory: its rows are a little longer than its columns, so that lanes in
// different rows meet different banks.
template <class T>
struct Exchange {
  static constexpr int kStride = T::kColumnsOfWarp + kFour;
  static constexpr int kSize = kProductRows * kStride;  // of int32
  static constexpr int kLanes = T::kColumnsOfWarp / kFour;
  static_assert(kLanes == 16, "and the second half of 64 channels is eight lanes further on");
  int32_t* memory;

  DFQ_DEVICE void write(const int32_t (&sums)[T::kWide][4]) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int wide = 0; wide < T::kWide; ++wide) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Cell cell = cell_of_sum(lane, i);
        memory[cell.row * kStride + wide * kProductColumns + cell.column] =
            sums[wide][i] >> T::shift();
      }
    }
  }
  DFQ_DEVICE void read(int row, int four, int32_t (&sums)[kFour]) const {
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      sums[i] = memory[row * kStride + four * kFour + i];
    }
  }
};

// `first_row` and `first_column` are those of the warp, in the block's tile.
template <class T>
struct WarpTile {
  int64_t tile_row;     // of the block, among all rows
  int64_t tile_column;  // of the block, in its group
  int64_t group;
  int first_row, first_column;
};

template <class T>
DFQ_DEVICE void write_outputs(const IntegerLayer& layer, const typename T::Sums& sums,
                              const WarpTile<T>& at, const Corrections& corrections,
                              const Exchange<T>& exchange) {
  constexpr int kAtOnce = kWarp / Exchange<T>::kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, four = lane % Exchange<T>::kLanes;
  const int column = at.first_column + four * kFour;
  const int64_t channel = at.tile_column + column, rest = layer.group_channels - channel;
  const int count = rest < 0 ? 0 : rest < kFour ? static_cast<int>(rest) : kFour;
  const FourChannels channels(layer, at.group * layer.group_channels + channel, count,
                              corrections.of_columns + column);
#pragma unroll
  for (int high = 0; high < T::kHigh; ++high) {
    exchange.write(sums[high]);
    __syncwarp();
#pragma unroll 2
    for (int i = 0; i < kProductRows; i += kAtOnce) {
      const int row = i + lane / Exchange<T>::kLanes;
      const int tile_row = at.first_row + high * kProductRows + row;
      int32_t four_sums[kFour];
      exchange.read(row, four, four_sums);
      channels.finish(at.tile_row + tile_row, four_sums, corrections.of_rows[tile_row]);
    }
    __syncwarp();
  }
}

}  // namespace dfq

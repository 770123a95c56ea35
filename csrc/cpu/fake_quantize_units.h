// How fake_quantize cuts a tensor: the channels' grids, and units of neighbours for the inner
// loops.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "common.h"
#include "fake_quantize_spans.h"
#include "memory_order.h"
#include "philox.h"

namespace dfq {

constexpr int64_t kSegment = 4096;  // neighbours handled at once, with one sum
constexpr int64_t kChunk = 32768;   // elements that a thread takes at once, or one unit
constexpr int64_t kGrain = 4;       // chunks below which a second thread does not pay
constexpr int64_t kFlushRows = 32;  // rows of channels summed in float32 before going on in double
constexpr int64_t kShortTable = 512, kLongTable = 2048;  // short rows of channels are joined

// A float for each channel, wherever it lies.
struct PerChannel {
  const float* values;
  int64_t stride;

  explicit PerChannel(const Tensor& tensor)
      : values(tensor.const_data_ptr<float>()), stride(tensor.stride(0)) {}
  float operator[](int64_t channel) const { return values[channel * stride]; }
};

// The arguments of both ops, and what follows from them.
class Call {
 public:
  Call(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
       int64_t quant_max, std::optional<int64_t> axis, double drop,
       const std::optional<Tensor>& seed)
      : x(x),
        axis(axis),
        channels(scale.numel()),
        threshold(seed ? drop_threshold(drop) : 0),
        seed(seed ? static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) : 0),
        scale_(scale),
        zero_point_(zero_point),
        quant_min_(quant_min),
        quant_max_(quant_max) {
    const int64_t expected = axis ? x.size(*axis) : 1;
    STD_TORCH_CHECK(channels == expected && zero_point.numel() == expected, "expected ", expected,
                    " scales and zero points, got ", channels, " and ", zero_point.numel());
  }

  Grid<float> grid(int64_t channel) const {
    return make_grid(scale_[channel], zero_point_[channel], quant_min_, quant_max_);
  }

  const Tensor& x;
  const std::optional<int64_t> axis;
  const int64_t channels;
  const int32_t threshold;  // of QDrop; 0 drops nothing
  const uint64_t seed;

 private:
  PerChannel scale_, zero_point_;
  int64_t quant_min_, quant_max_;
};

// At least n floats, zero, whole vectors of them, and the first on a cache line.
class AlignedFloats {
 public:
  explicit AlignedFloats(int64_t n) : lines_(ceil_div(n, kLanes)) {}
  float* data() { return lines_.front().value; }
  const float* data() const { return lines_.front().value; }
  void clear() { std::fill(lines_.begin(), lines_.end(), Line()); }

 private:
  struct alignas(64) Line {
    float value[kLanes] = {};
  };
  std::vector<Line> lines_;
};

// The grids of a row of `length` neighbours, among which the channels repeat.
class Table {
 public:
  Table(const Call& call, int64_t length)
      : inverse_(length), scale_(length), low_(length), high_(length) {
    for (int64_t i = 0; i < length; ++i) {
      const auto grid = call.grid(i % call.channels);
      inverse_.data()[i] = grid.inverse;
      scale_.data()[i] = grid.scale;
      low_.data()[i] = grid.low;
      high_.data()[i] = grid.high;
    }
  }
  GridTable from(int64_t i) const {
    return {inverse_.data() + i, scale_.data() + i, low_.data() + i, high_.data() + i};
  }

 private:
  AlignedFloats inverse_, scale_, low_, high_;
};

template <class T>
struct Scratch {
  T x[kSegment], grad[kSegment], out[kLanes];
  uint32_t keep[kSegment + 2 * DropMask::kAtOnce * kLanes];
};

// A tensor cut into units, each at most kSegment neighbours of the output, and units into chunks.
template <class T>
class Units {
 public:
  Units(const Call& call, const Tensor& shaped, const Tensor& grad, T* out)
      : call_(call),
        order_(memory_order_of(shaped, call.x, grad, call.axis)),
        source_{data<T>(call.x), data<T>(grad)},
        out_(out),
        numel_(call.x.numel()) {
    join_channel_rows(order_, kShortTable, kLongTable);
    segments_ = ceil_div(order_.inner.size, kSegment);
    count_ = order_.rows * segments_;
    per_chunk_ = std::max<int64_t>(1, kChunk / std::min(order_.inner.size, kSegment));
  }

  const Dimension& inner() const { return order_.inner; }
  int64_t count() const { return count_; }
  int64_t chunks() const { return ceil_div(count_, per_chunk_); }

  struct Unit {
    int64_t index;
    int64_t channel;  // of all its elements, or 0 if the channel varies
    int64_t column;   // where in the row it begins
  };

  // f(span, unit) for each unit of the chunk.
  template <class F>
  void visit(int64_t chunk, const F& f) const {
    Scratch<T> scratch;
    for (int64_t i = chunk * per_chunk_; i < std::min((chunk + 1) * per_chunk_, count_); ++i) {
      const auto row = order_.row(i / segments_);
      const int64_t column = i % segments_ * kSegment;
      const int64_t position = i / segments_ * order_.inner.size + column;
      const int64_t n = std::min({kSegment, order_.inner.size - column, numel_ - position});
      Span<T> span{read(0, row, column, n, scratch.x), nullptr, out_ ? out_ + position : nullptr,
                   keep(position, n, scratch.keep), std::max<int64_t>(n, kLanes)};
      span.grad = read(1, row, column, n, scratch.grad);
      const bool padded = out_ && n < kLanes;
      if (padded) {
        span.out = scratch.out;
      }
      f(span, Unit{i, row.channel, column});
      if (padded) {
        std::copy_n(scratch.out, n, out_ + position);
      }
    }
  }

 private:
  // n neighbours of an input: where they lie, or copied together and padded with zeros to 16.
  const T* read(int input, const MemoryOrder::Row& row, int64_t column, int64_t n,
                T* scratch) const {
    const int64_t stride = order_.inner.stride[input];
    const T* from = source_[input] + row.offset[input] + column * stride;
    if (stride == 1 && n >= kLanes) {
      return from;
    }
    for (int64_t i = 0; i < n; ++i) {
      scratch[i] = from[i * stride];
    }
    std::fill(scratch + n, scratch + std::max<int64_t>(n, kLanes), T{});
    return scratch;
  }

  const uint32_t* keep(int64_t position, int64_t n, uint32_t* scratch) const {
    constexpr int64_t kStep = DropMask::kAtOnce * kLanes;
    if (call_.threshold == 0) {
      return nullptr;
    }
    const int64_t before = position % kLanes;
    run<DropMask>(call_.seed, call_.threshold, static_cast<uint64_t>(position / kLanes),
                  ceil_div(before + n, kStep) * DropMask::kAtOnce, scratch);
    return scratch + before;
  }

  const Call& call_;
  MemoryOrder order_;
  const T* source_[kInputs];
  T* out_;
  int64_t numel_, segments_, count_, per_chunk_;
};

}  // namespace dfq

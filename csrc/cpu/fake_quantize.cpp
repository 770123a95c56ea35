// fake_quantize and its backward on the CPU: one pass over memory each, any layout.
// The specification is dfq_kernels/fake_quantize.py; integers are equal to it, bit for bit.
#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common.h"
#include "fake_quantize_spans.h"
#include "memory_order.h"
#include "philox.h"

namespace dfq {
namespace {

constexpr int64_t kSegment = 4096;  // neighbours handled at once, with one sum
constexpr int64_t kChunk = 32768;   // elements that a thread takes at once, or one unit
constexpr int64_t kGrain = 4;       // chunks below which a second thread does not pay
constexpr int64_t kFlushRows = 32;  // rows of channels summed in float32 before going on in double
constexpr int64_t kShortTable = 512, kLongTable = 2048;  // short rows of channels are joined

// The arguments of both ops, and what follows from them.
struct Call {
  const Tensor& x;
  const Tensor& scale;
  const Tensor& zero_point;
  int64_t quant_min, quant_max;
  std::optional<int64_t> axis;
  int32_t threshold;  // of QDrop; 0 drops nothing
  uint64_t seed;

  int64_t channels() const { return scale.numel(); }
  Grid<float> grid(int64_t channel) const {
    return make_grid(data<float>(scale)[channel * scale.stride(0)],
                     data<float>(zero_point)[channel * zero_point.stride(0)], quant_min, quant_max);
  }
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
      const auto grid = call.grid(i % call.channels());
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

template <class T, class F>
void each_chunk(const Units<T>& units, const F& f) {
  for_each_chunk(units.chunks(), f, kGrain);
}

// f(std::bool_constant): the same code with and without QDrop.
template <class F>
void with_drop(const Call& call, const F& f) {
  call.threshold > 0 ? f(std::true_type()) : f(std::false_type());
}

// run<Kernel>(span, grids) over everything: what needs no sums.
template <class Kernel, class T>
void run_elementwise(const Call& call, const Units<T>& units) {
  if (units.inner().channel) {
    const Table table(call, units.inner().size);
    each_chunk(units, [&](int64_t chunk) {
      units.visit(chunk, [&](const Span<T>& span, const auto& unit) {
        run<Kernel>(span, table.from(unit.column));
      });
    });
    return;
  }
  each_chunk(units, [&](int64_t chunk) {
    units.visit(chunk, [&](const Span<T>& span, const auto& unit) {
      run<Kernel>(span, call.grid(unit.channel));
    });
  });
}

// The sums of the terms of backward, one a channel.
struct ChannelSums {
  std::vector<double> scale, clamped;

  explicit ChannelSums(int64_t channels) : scale(channels), clamped(channels) {}
  void add(const ChannelSums& other) {
    for (size_t c = 0; c < scale.size(); ++c) {
      scale[c] += other.scale[c];
      clamped[c] += other.clamped[c];
    }
  }
};

// Sums over rows of one channel each: one partial sum a unit, added up in the order of units.
template <bool Drop, class T>
ChannelSums backward_rows(const Call& call, const Units<T>& units) {
  struct Partial {
    RowSums sums;
    int64_t channel;
  };
  std::vector<Partial> partials(units.count());
  each_chunk(units, [&](int64_t chunk) {
    units.visit(chunk, [&](const Span<T>& span, const auto& unit) {
      Partial& partial = partials[unit.index];
      partial.channel = unit.channel;
      run<BackwardRow<Drop>>(span, call.grid(unit.channel), &partial.sums);
    });
  });
  ChannelSums totals(call.channels());
  for (const Partial& partial : partials) {
    totals.scale[partial.channel] += partial.sums.scale;
    totals.clamped[partial.channel] += partial.sums.clamped;
  }
  return totals;
}

// Sums for each position of a row of channels, over the rows of a chunk.
class PositionSums {
 public:
  PositionSums(int64_t length, ChannelSums& totals)
      : length_(length), scale_(length), clamped_(length), totals_(totals) {}
  float* scale(int64_t column) { return scale_.data() + column; }
  float* clamped(int64_t column) { return clamped_.data() + column; }
  void flush() {
    const int64_t channels = totals_.scale.size();
    for (int64_t begin = 0; begin < length_; begin += channels) {
      add(scale(begin), totals_.scale);
      add(clamped(begin), totals_.clamped);
    }
    scale_.clear();
    clamped_.clear();
  }

 private:
  static void add(const float* sums, std::vector<double>& totals) {
    for (size_t c = 0; c < totals.size(); ++c) {
      totals[c] += sums[c];
    }
  }
  int64_t length_;
  AlignedFloats scale_, clamped_;
  ChannelSums& totals_;
};

// Sums over rows in which the channel varies: for every channel in each chunk.
template <bool Drop, class T>
ChannelSums backward_table(const Call& call, const Units<T>& units) {
  const int64_t channels = call.channels(), length = units.inner().size;
  const Table table(call, length);
  std::vector<ChannelSums> partials(units.chunks(), ChannelSums(channels));
  each_chunk(units, [&](int64_t chunk) {
    PositionSums sums(length, partials[chunk]);
    int64_t spans = 0;
    units.visit(chunk, [&](const Span<T>& span, const auto& unit) {
      run<BackwardTable<Drop>>(span, table.from(unit.column), sums.scale(unit.column),
                               sums.clamped(unit.column));
      if (++spans % kFlushRows == 0) {
        sums.flush();
      }
    });
    sums.flush();
  });
  ChannelSums totals(channels);
  for (const ChannelSums& partial : partials) {
    totals.add(partial);
  }
  return totals;
}

Call make_call(const Tensor& x, const Tensor& scale, const Tensor& zero_point, int64_t quant_min,
               int64_t quant_max, std::optional<int64_t> axis, double drop,
               const std::optional<Tensor>& seed) {
  const int32_t threshold = seed ? drop_threshold(drop) : 0;
  return {x,         scale, zero_point, quant_min,
          quant_max, axis,  threshold,  seed ? static_cast<uint64_t>(*data<int64_t>(*seed)) : 0};
}

Tensor fake_quantize_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                         int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                         double drop, std::optional<Tensor> seed) {
  const Call call = make_call(x, scale, zero_point, quant_min, quant_max, axis, drop, seed);
  const Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) {
    return y;
  }
  with_storage(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Units<T> units(call, y, x, mutable_data<T>(y));
    with_drop(call, [&](auto drop) { run_elementwise<Forward<drop()>>(call, units); });
  });
  return y;
}

struct Needs {
  bool x, scale, zero_point;
};

// The gradient of x into `dx` if it is needed; the sums, one a channel, if they are.
ChannelSums backward(const Call& call, const Tensor& grad, const Tensor& dx, Needs needs) {
  ChannelSums totals(call.channels());
  with_storage(call.x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Units<T> units(call, dx, grad, needs.x ? mutable_data<T>(dx) : nullptr);
    with_drop(call, [&](auto drop) {
      if (!needs.scale && !needs.zero_point) {
        run_elementwise<BackwardInput<drop()>>(call, units);
      } else if (units.inner().channel) {
        totals = backward_table<drop()>(call, units);
      } else {
        totals = backward_rows<drop()>(call, units);
      }
    });
  });
  return totals;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis, double drop,
    std::optional<Tensor> seed, bool needs_x, bool needs_scale, bool needs_zero_point) {
  const Call call = make_call(x, scale, zero_point, quant_min, quant_max, axis, drop, seed);
  const Needs needs{needs_x, needs_scale, needs_zero_point};
  const Tensor dx = torch::stable::empty_like(x);
  const auto totals = x.numel() > 0 && (needs_x || needs_scale || needs_zero_point)
                          ? backward(call, grad, dx, needs)
                          : ChannelSums(call.channels());
  const auto empty = [](const Tensor& like, int64_t size) {
    return torch::stable::new_empty(like, {size});
  };
  const int64_t channels = call.channels();
  const Tensor dscale = empty(scale, needs_scale ? channels : 0);
  const Tensor dzero_point = empty(scale, needs_zero_point ? channels : 0);
  for (int64_t c = 0; c < channels; ++c) {
    if (needs_scale) {
      mutable_data<float>(dscale)[c] = static_cast<float>(totals.scale[c]);
    }
    if (needs_zero_point) {
      mutable_data<float>(dzero_point)[c] =
          static_cast<float>(-call.grid(c).scale * totals.clamped[c]);
    }
  }
  return {needs_x ? dx : empty(x, 0), dscale, dzero_point};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dfq_C, m) {
  m.def(
      "fake_quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
      "int? axis, float drop, Tensor? seed) -> Tensor");
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor x, Tensor scale, Tensor zero_point, "
      "int quant_min, int quant_max, int? axis, float drop, Tensor? seed, bool needs_x, "
      "bool needs_scale, bool needs_zero_point) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(dfq_C, CPU, m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize_cpu));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward_cpu));
}

}  // namespace dfq

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

// Grids repeated along a row of `length` neighbours, and room for one vector past the end.
class Table {
 public:
  Table(const Call& call, int64_t length) : size_(std::max<int64_t>(length, kLanes)) {
    values_.resize(4 * size_);
    for (int64_t i = 0; i < length; ++i) {
      const auto grid = i < call.channels() ? call.grid(i) : at(i - call.channels());
      values_[i] = grid.inverse;
      values_[size_ + i] = grid.scale;
      values_[2 * size_ + i] = grid.low;
      values_[3 * size_ + i] = grid.high;
    }
  }
  GridTable from(int64_t i) const {
    const float* values = values_.data() + i;
    return {values, values + size_, values + 2 * size_, values + 3 * size_};
  }

 private:
  Grid<float> at(int64_t i) const {
    return {values_[i], values_[size_ + i], values_[2 * size_ + i], values_[3 * size_ + i]};
  }
  int64_t size_;
  std::vector<float> values_;
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

// Sums over rows of one channel each: one partial sum a unit, added up in the order of
// units.
template <bool Drop, class T>
std::vector<GradientSums> backward_rows(const Call& call, const Units<T>& units) {
  struct Partial {
    GradientSums sums;
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
  std::vector<GradientSums> totals(call.channels());
  for (const Partial& partial : partials) {
    totals[partial.channel].scale += partial.sums.scale;
    totals[partial.channel].clamped += partial.sums.clamped;
  }
  return totals;
}

// Sums of one position of a row of channels, over the rows of a chunk.
class ColumnSums {
 public:
  ColumnSums(int64_t length, GradientSums* totals, int64_t channels)
      : scale_(std::max<int64_t>(length, kLanes)),
        clamped_(scale_.size()),
        length_(length),
        totals_(totals),
        channels_(channels) {}
  float* scale(int64_t column) { return scale_.data() + column; }
  float* clamped(int64_t column) { return clamped_.data() + column; }
  void flush() {
    for (int64_t begin = 0; begin < length_; begin += channels_) {
      for (int64_t c = 0; c < channels_; ++c) {
        totals_[c].scale += scale_[begin + c];
        totals_[c].clamped += clamped_[begin + c];
      }
    }
    std::fill(scale_.begin(), scale_.end(), 0.0f);
    std::fill(clamped_.begin(), clamped_.end(), 0.0f);
  }

 private:
  std::vector<float> scale_, clamped_;
  int64_t length_;
  GradientSums* totals_;
  int64_t channels_;
};

// Sums over rows in which the channel varies: sums for every channel in each chunk.
template <bool Drop, class T>
std::vector<GradientSums> backward_table(const Call& call, const Units<T>& units) {
  const int64_t channels = call.channels(), length = units.inner().size;
  const Table table(call, length);
  std::vector<GradientSums> partials(units.chunks() * channels);
  each_chunk(units, [&](int64_t chunk) {
    ColumnSums sums(length, partials.data() + chunk * channels, channels);
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
  std::vector<GradientSums> totals(partials.begin(), partials.begin() + channels);
  for (size_t i = channels; i < partials.size(); ++i) {
    totals[i % channels].scale += partials[i].scale;
    totals[i % channels].clamped += partials[i].clamped;
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
std::vector<GradientSums> backward(const Call& call, const Tensor& grad, const Tensor& dx,
                                   Needs needs) {
  std::vector<GradientSums> totals(call.channels());
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
                          : std::vector<GradientSums>(call.channels());
  const auto empty = [](const Tensor& like, int64_t size) {
    return torch::stable::new_empty(like, {size});
  };
  const int64_t channels = call.channels();
  const Tensor dscale = empty(scale, needs_scale ? channels : 0);
  const Tensor dzero_point = empty(scale, needs_zero_point ? channels : 0);
  for (int64_t c = 0; c < channels; ++c) {
    if (needs_scale) {
      mutable_data<float>(dscale)[c] = static_cast<float>(totals[c].scale);
    }
    if (needs_zero_point) {
      mutable_data<float>(dzero_point)[c] =
          static_cast<float>(-call.grid(c).scale * totals[c].clamped);
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

// fake_quantize and its backward on the CPU: one pass over memory each, any layout.
// The specification is dfq_kernels/fake_quantize.py; integers are equal to it, bit for bit.
#include "fake_quantize.h"

#include <type_traits>
#include <vector>

#include "fake_quantize_spans.h"
#include "fake_quantize_units.h"

namespace dfq {
namespace {

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
  ChannelSums totals(call.channels);
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
  const int64_t channels = call.channels, length = units.inner().size;
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

struct Needs {
  bool x, scale, zero_point;
};

// The gradient of x into `dx` if it is needed; the sums, one a channel, if they are.
ChannelSums backward(const Call& call, const Tensor& grad, const Tensor& dx, Needs needs) {
  ChannelSums totals(call.channels);
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

}  // namespace

Tensor fake_quantize_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                         int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                         double drop, std::optional<Tensor> seed) {
  const Call call(x, scale, zero_point, quant_min, quant_max, axis, drop, seed);
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

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis, double drop,
    std::optional<Tensor> seed, bool needs_x, bool needs_scale, bool needs_zero_point) {
  const Call call(x, scale, zero_point, quant_min, quant_max, axis, drop, seed);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.sizes() == x.sizes(),
                  "the gradient's dtype and shape must be those of x");
  const Needs needs{needs_x, needs_scale, needs_zero_point};
  const Tensor dx = torch::stable::empty_like(x);
  const auto totals = x.numel() > 0 && (needs_x || needs_scale || needs_zero_point)
                          ? backward(call, grad, dx, needs)
                          : ChannelSums(call.channels);
  const auto empty = [](const Tensor& like, int64_t size) {
    return torch::stable::new_empty(like, {size});
  };
  const int64_t channels = call.channels;
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

// fake_quantize and its backward over neighbours in memory: the inner loops.
#pragma once

#include <algorithm>

#include "core/arithmetic.h"
#include "narrow.h"

namespace dfq {

constexpr int64_t kSumBlock = 512;  // elements summed in float32 before going on in double

// The grids of neighbours: one for all, or one for each. Call load_grids before the loop.
struct GridTable {
  const float *inverse, *scale, *low, *high;
};
template <int W>
struct OneGridLoaded {
  Grid<Floats<W>> grid;
  DFQ_INLINE Grid<Floats<W>> at(int64_t) const { return grid; }
};
template <int W>
struct GridTableLoaded {
  GridTable grids;
  DFQ_INLINE Grid<Floats<W>> at(int64_t i) const {
    return {load<W>(grids.inverse + i), load<W>(grids.scale + i), load<W>(grids.low + i),
            load<W>(grids.high + i)};
  }
};
template <int W>
DFQ_INLINE OneGridLoaded<W> load_grids(Grid<float> grid) {
  return {
      {floats<W>(grid.inverse), floats<W>(grid.scale), floats<W>(grid.low), floats<W>(grid.high)}};
}
template <int W>
DFQ_INLINE GridTableLoaded<W> load_grids(GridTable grids) {
  return {grids};
}

// n neighbours, n >= 16. keep, if there is one, is all ones where the element stays float.
template <class T>
struct Span {
  const T* x;
  const T* grad;
  T* out;  // y, or in backward the gradient of x; null if nobody needs it
  const uint32_t* keep;
  int64_t n;
};

template <bool Drop>
struct Forward {
  template <int W, class T, class Grids>
  static DFQ_INLINE void run(Span<T> span, Grids from) {
    const auto grids = load_grids<W>(from);
    int64_t i = 0;
    for (; i + kLanes <= span.n; i += kLanes) {
      step<W>(span, grids, i);
    }
    if (i < span.n) {
      step<W>(span, grids, span.n - kLanes);  // some are computed twice
    }
  }

 private:
  template <int W, class T, class Grids>
  static DFQ_INLINE void step(const Span<T>& span, const Grids& grids, int64_t i) {
    const auto x = load<W>(span.x + i);
    auto y = fake_quantize(x, grids.at(i));
    if constexpr (Drop) {
      y = blend(load_words<W>(span.keep + i), x, y);
    }
    store(span.out + i, y);
  }
};

// Stores the gradient of x at i and returns the terms of the other two; of the last lanes only,
// where the others were counted before.
template <int W, bool Drop, class T, class Grids>
DFQ_INLINE Gradients<Floats<W>> backward_step(const Span<T>& span, const Grids& grids, int64_t i) {
  const auto grad = load<W>(span.grad + i);
  const auto x = load<W>(span.x + i);
  auto result = fake_quantize_backward(grad, x, grids.at(i));
  if constexpr (Drop) {
    const auto keep = load_words<W>(span.keep + i);
    const auto quantized = keep ^ words<W>(0xffffffffu);
    result = {blend(keep, grad, result.x), only(quantized, result.scale),
              only(quantized, result.clamped)};
  }
  if (span.out) {
    store(span.out + i, result.x);
  }
  return result;
}
template <int W, bool Drop, class T, class Grids>
DFQ_INLINE Gradients<Floats<W>> backward_tail(const Span<T>& span, const Grids& grids, int64_t i) {
  const int64_t last = span.n - kLanes;
  const auto fresh = lanes_from<W>(i - last);
  const auto result = backward_step<W, Drop>(span, grids, last);
  return {result.x, only(fresh, result.scale), only(fresh, result.clamped)};
}

struct RowSums {
  double scale = 0;
  double clamped = 0;
};

// One grid for the span; adds the sums of the terms to *sums, if there is one.
template <bool Drop>
struct BackwardRow {
  template <int W, class T>
  static DFQ_INLINE void run(Span<T> span, Grid<float> from, RowSums* sums) {
    const auto grid = load_grids<W>(from);
    int64_t i = 0;
    while (i + kLanes <= span.n) {
      const int64_t end = std::min(i + kSumBlock, span.n - kLanes + 1);
      auto scale = floats<W>(0.0f), clamped = floats<W>(0.0f);
      for (; i < end; i += kLanes) {
        const auto terms = backward_step<W, Drop>(span, grid, i);
        scale = scale + terms.scale;
        clamped = clamped + terms.clamped;
      }
      add(sums, scale, clamped);
    }
    if (i < span.n) {
      const auto terms = backward_tail<W, Drop>(span, grid, i);
      add(sums, terms.scale, terms.clamped);
    }
  }

 private:
  template <class F>
  static DFQ_INLINE void add(RowSums* sums, F scale, F clamped) {
    sums->scale += sum(scale);
    sums->clamped += sum(clamped);
  }
};

// The gradient of x alone.
template <bool Drop>
struct BackwardInput {
  template <int W, class T, class Grids>
  static DFQ_INLINE void run(Span<T> span, Grids from) {
    const auto grids = load_grids<W>(from);
    int64_t i = 0;
    for (; i + kLanes <= span.n; i += kLanes) {
      backward_step<W, Drop>(span, grids, i);
    }
    if (i < span.n) {
      backward_step<W, Drop>(span, grids, span.n - kLanes);
    }
  }
};

// A grid and sums for each position.
template <bool Drop>
struct BackwardTable {
  template <int W, class T>
  static DFQ_INLINE void run(Span<T> span, GridTable from, float* scale, float* clamped) {
    const auto grids = load_grids<W>(from);
    int64_t i = 0;
    for (; i + kLanes <= span.n; i += kLanes) {
      add(backward_step<W, Drop>(span, grids, i), scale + i, clamped + i);
    }
    if (i < span.n) {
      const int64_t last = span.n - kLanes;
      add(backward_tail<W, Drop>(span, grids, i), scale + last, clamped + last);
    }
  }

 private:
  template <int W>
  static DFQ_INLINE void add(Gradients<Floats<W>> terms, float* scale, float* clamped) {
    store(scale, load<W>(scale) + terms.scale);
    store(clamped, load<W>(clamped) + terms.clamped);
  }
};

}  // namespace dfq

// What fake_quantize and its backward do to an element, for the walk.
#pragma once

#include "fake_quantize.h"
#include "walk.h"

namespace dfq {

struct FakeQuantize {
  static constexpr int kInputs = 1;
  static constexpr bool kDrops = true;
  using Channel = Grid<float>;
  using Sums = NoSums;

  Quantizer quantizer;
  void* out;
  const int64_t* seed;
  int32_t threshold;

  DFQ_DEVICE Channel channel(int64_t c) const { return quantizer.grid(c); }
  DFQ_DEVICE float element(const Channel& grid, const Element& at, Sums&) const {
    const float y = fake_quantize(at.x, grid);
    return at.stays ? at.x : y;
  }
};

struct FakeQuantizeBackward {
  static constexpr int kInputs = 2;
  static constexpr bool kDrops = true;
  using Channel = Grid<float>;
  using Sums = PlainSums;

  Quantizer quantizer;
  void* out;
  const int64_t* seed;
  int32_t threshold;
  Pair<double>* partials;

  DFQ_DEVICE Channel channel(int64_t c) const { return quantizer.grid(c); }
  DFQ_DEVICE float element(const Channel& grid, const Element& at, Sums& sums) const {
    const auto of = fake_quantize_backward(at.grad, at.x, grid);
    if (at.stays) {
      return at.grad;
    }
    sums.first += of.scale;
    sums.second += of.clamped;
    return of.x;
  }
  DFQ_DEVICE Pair<double> partial(const Pair<double>& sums, float, int64_t) const { return sums; }
};

// The gradients of scale and zero_point from the sums of all blocks.
struct FinishQuantizer {
  Quantizer quantizer;
  float* scale;
  float* zero_point;

  DFQ_DEVICE Pair<double> term(const Blocks&, const Blocks::Entry&, const Pair<double>& sums,
                               const Pair<double>&) const {
    return sums;
  }
  DFQ_DEVICE void operator()(int64_t channel, const Pair<double>& sums, const Pair<double>&) const {
    if (scale) {
      scale[channel] = static_cast<float>(sums.first);
    }
    if (zero_point) {
      const double step = quantizer.scale[channel * quantizer.scale_stride];
      zero_point[channel] = static_cast<float>(-step * sums.second);
    }
  }
};

}  // namespace dfq

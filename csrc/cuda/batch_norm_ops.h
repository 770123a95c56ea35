// What batch_norm and its backward do to an element, for the walk, and to the sums of a channel.
#pragma once

#include "batch_norm.h"
#include "walk.h"

namespace dfq {

// The deviations of some x from the first of them, or the mean of the first vector: small, whatever
// the mean of the channel is and whoever guesses it. Then those of all threads' x from the mean of
// the first ones.
struct Moments {
  float first, sum, squares, count;

  DFQ_DEVICE void start(float x) { first = x; }
  DFQ_DEVICE void add(float x) {
    const float deviation = x - first;
    sum += deviation;
    squares = fmaf(deviation, deviation, squares);
  }
  DFQ_DEVICE float nothing() const { return first; }
  DFQ_DEVICE void end(int n) { count = static_cast<float>(n); }

  template <class Columns>
  static DFQ_DEVICE float origin(const Moments* moments, const Columns& of_slot, int member,
                                 int group) {
    const float reference = of_slot.count > 0 ? moments[of_slot[0]].first : 0;
    Pair<float> sums{0, 0};
    for (int i = member; i < of_slot.count; i += group) {
      const Moments& column = moments[of_slot[i]];
      if (column.count > 0) {
        sums.first += column.first - reference;
        sums.second += 1;
      }
    }
    sums = sum_over_lanes(sums, group);
    return sums.second > 0 ? reference + sums.first / sums.second : reference;
  }
  DFQ_DEVICE Pair<double> terms(float origin) const {
    if (count == 0) {
      return {0, 0};
    }
    const double shift = static_cast<double>(first) - origin;
    return {sum + count * shift, squares + shift * (2 * sum + count * shift)};
  }
};

struct NormalizeElement {
  static constexpr int kInputs = 1;
  static constexpr bool kDrops = false;
  struct Channel {
    float shift, scale, bias;
  };
  using Sums = Moments;

  ChannelTable table;
  void* out;
  float low;  // of y: 0 with ReLU
  Pair<double>* partials;

  DFQ_DEVICE Channel channel(int64_t c) const {
    if (!out) {
      return {0, 0, 0};
    }
    return {table.at(ChannelTable::kShift, c), table.at(ChannelTable::kScale, c),
            table.at(ChannelTable::kBias, c)};
  }
  DFQ_DEVICE float element(const Channel& of, const Element& at, Moments& moments) const {
    moments.add(at.x);
    const float y = (at.x - of.shift) * of.scale + of.bias;
    return y < low ? low : y;  // NaN stays
  }
  // The mean of n elements and the sum of their squared deviations from it.
  DFQ_DEVICE Pair<double> partial(const Pair<double>& sums, float origin, int64_t n) const {
    if (n == 0) {
      return {0, 0};
    }
    const double rest = sums.first / static_cast<double>(n);
    return {origin + rest, sums.second - sums.first * rest};
  }
};

struct FinishStatistics {
  float *mean, *var;
  int64_t count;

  // As deviations from the first mean.
  DFQ_DEVICE Pair<double> term(const Blocks& blocks, const Blocks::Entry& entry,
                               const Pair<double>& sums, const Pair<double>& origin) const {
    const auto n = static_cast<double>(blocks.elements(blocks.place(entry.block), entry.slot));
    const double d = sums.first - origin.first;
    return {n * d, sums.second + n * d * d};
  }
  DFQ_DEVICE void operator()(int64_t channel, const Pair<double>& sums,
                             const Pair<double>& origin) const {
    const double d = sums.first / static_cast<double>(count);
    const double variance = sums.second / static_cast<double>(count) - d * d;
    mean[channel] = static_cast<float>(origin.first + d);
    var[channel] = static_cast<float>(variance < 0 ? 0 : variance);  // NaN stays
  }
};

// dx = g * scale + (offset + slope * (x - mean)), where g is the gradient of y, with ReLU where y
// is above 0; and the sums of g * (x - shift) and of g.
struct NormalizeElementBackward {
  static constexpr int kInputs = 2;
  static constexpr bool kDrops = false;
  struct Channel {
    float shift, scale, bias, mean, offset, slope;
  };
  using Sums = PlainSums;

  ChannelTable table;
  void* out;
  bool relu, has_grad, has_statistics;
  Pair<double>* partials;

  DFQ_DEVICE Channel channel(int64_t c) const {
    return {table.at(ChannelTable::kShift, c),  table.at(ChannelTable::kScale, c),
            table.at(ChannelTable::kBias, c),   table.at(ChannelTable::kMean, c),
            table.at(ChannelTable::kOffset, c), table.at(ChannelTable::kSlope, c)};
  }
  DFQ_DEVICE float element(const Channel& of, const Element& at, Sums& sums) const {
    const float d = at.x - of.shift;
    const bool passes = has_grad && (!relu || d * of.scale + of.bias > 0);
    const float g = passes ? at.grad : 0;
    sums.first += g * d;
    sums.second += g;
    const float rest = of.offset + of.slope * (at.x - of.mean);
    return g * of.scale + (has_statistics ? rest : 0);
  }
  DFQ_DEVICE Pair<double> partial(const Pair<double>& sums, float, int64_t) const { return sums; }
};

struct FinishBatchNorm {
  BatchNormArguments arguments;
  float *grad_weight, *grad_bias;

  DFQ_DEVICE Pair<double> term(const Blocks&, const Blocks::Entry&, const Pair<double>& sums,
                               const Pair<double>&) const {
    return sums;
  }
  DFQ_DEVICE void operator()(int64_t channel, const Pair<double>& sums, const Pair<double>&) const {
    const double var = arguments.running_var.at(channel, 1);
    grad_weight[channel] = static_cast<float>(sums.first * (1 / sqrt(var + arguments.eps)));
    grad_bias[channel] = static_cast<float>(sums.second);
  }
};

}  // namespace dfq

// What batch_norm does to a tile. The sums of a tile are shifted by its own mean, which is taken
// while the tile comes into the L1 cache: the accuracy of the statistics does not depend on a guess
// of the mean, and x is read from memory once.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "common.h"
#include "tiles.h"
#include "walk.h"

namespace dfq {

using PerChannel = std::vector<float>;

// y = (x - shift) * scale + bias.
struct Affine {
  PerChannel shift, scale, bias;
};

// The gradient of a loss on mean and var with respect to x is offset + slope * (x - mean).
struct OfStatistics {
  PerChannel mean, offset, slope;
};

// The same for the lanes of a tile.
template <class Channels>
struct AffineLanes {
  typename Channels::Value shift, scale, bias;

  DFQ_INLINE AffineLanes(const Affine& of, const Tile& t)
      : shift(&of.shift[t.channel], t),
        scale(&of.scale[t.channel], t),
        bias(&of.bias[t.channel], t) {}
};
template <class Channels>
struct OfStatisticsLanes {
  typename Channels::Value mean, offset, slope;

  DFQ_INLINE OfStatisticsLanes(const OfStatistics& of, const Tile& t)
      : mean(&of.mean[t.channel], t),
        offset(&of.offset[t.channel], t),
        slope(&of.slope[t.channel], t) {}
};

// Two float64 values for each group of tiles and each channel.
class Partials {
 public:
  explicit Partials(const Tiling& tiling)
      : channels_(tiling.channels()), values_(new double[2 * tiling.groups() * channels_]) {}

  double* at(int64_t group, int which) const {
    return values_.get() + (2 * group + which) * channels_;
  }

 private:
  int64_t channels_;
  std::unique_ptr<double[]> values_;
};

// y, and of each tile its mean and the sum of (x - mean)^2.
struct Forward {
  const Tiling& tiling;  // of x, y
  const void* x;
  void* y;
  const Affine* affine;
  bool relu;
  const Partials& partials;
};

template <class Channels, int W, class T>
DFQ_INLINE void tile_means(const Lines<const T>& x, const Tile& t, float* means) {
  typename Channels::template Totals<1> totals(t);
  Channels::walk(t, totals,
                 [&](auto part, int64_t line, int64_t i, int64_t, auto& sums) DFQ_LAMBDA {
                   sums.value[0] = sums.value[0] + part.keep(load<W>(x.at(line, i)));
                 });
  for (int64_t c = 0; c < t.channels; ++c) {
    means[c] = static_cast<float>(totals.of_channel(0, c, t) / t.per_channel());
    if constexpr (sizeof(T) == 2) {
      // As short as x: then x - mean is exact. Its rounding would be the same for equal x, of which
      // there are many, and would not average out.
      uint32_t bits;
      std::memcpy(&bits, &means[c], sizeof(bits));
      bits &= 0xfffff000u;
      std::memcpy(&means[c], &bits, sizeof(bits));
    }
  }
}

// kWrites: y too, and not the statistics alone.
template <class Channels, int W, class T, bool kWrites>
DFQ_INLINE void forward_tile(const Forward& job, const Tile& t) {
  alignas(64) T x_buffer[kBuffer], y_buffer[kBuffer];
  const auto x = job.tiling.gather(0, t, static_cast<const T*>(job.x), x_buffer);
  float means[kMaxChannels];
  tile_means<Channels, W>(x, t, means);
  const typename Channels::Value mean(means, t);
  typename Channels::template Totals<2> totals(t);
  const auto measure = [&](auto part, Floats<W> v, int64_t lane, auto& sums) DFQ_LAMBDA {
    const auto d = part.keep(v - mean[lane]);
    sums.value[0] = sums.value[0] + d;
    sums.value[1] = sums.value[1] + d * d;
  };
  if constexpr (kWrites) {
    const AffineLanes<Channels> of(*job.affine, t);
    const auto low = floats<W>(job.relu ? 0.0f : -INFINITY);
    const auto y = job.tiling.target(1, t, static_cast<T*>(job.y), y_buffer);
    Channels::walk(t, totals,
                   [&](auto part, int64_t line, int64_t i, int64_t lane, auto& sums) DFQ_LAMBDA {
                     const auto v = load<W>(x.at(line, i));
                     measure(part, v, lane, sums);
                     const auto out = (v - of.shift[lane]) * of.scale[lane] + of.bias[lane];
                     store(y.at(line, i), where(out < low, low, out));  // NaN stays
                   });
    job.tiling.scatter(1, t, y_buffer, static_cast<T*>(job.y));
  } else {
    Channels::walk(t, totals,
                   [&](auto part, int64_t line, int64_t i, int64_t lane, auto& sums)
                       DFQ_LAMBDA { measure(part, load<W>(x.at(line, i)), lane, sums); });
  }
  for (int64_t c = 0; c < t.channels; ++c) {
    const double sum = totals.of_channel(0, c, t);  // what rounding the mean left over
    const double rest = sum / t.per_channel();
    job.partials.at(t.group, 0)[t.channel + c] = means[c] + rest;
    job.partials.at(t.group, 1)[t.channel + c] = totals.of_channel(1, c, t) - sum * rest;
  }
}

template <class T, bool kWrites>
struct ForwardTiles {
  template <int W>
  static DFQ_INLINE void run(const Forward* job, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tile t = job->tiling.tile(i);
      if (job->tiling.interleaved()) {
        forward_tile<ManyChannels<W>, W, T, kWrites>(*job, t);
      } else {
        forward_tile<OneChannel<W>, W, T, kWrites>(*job, t);
      }
    }
  }
};

// dx = g * scale + (offset + slope * (x - mean)), where g is dy, with ReLU where y is above 0; and
// of each tile the sums of g * (x - shift) and of g.
struct Backward {
  const Tiling& tiling;  // of x, dx, dy
  const void* x;
  void* dx;
  const void* dy;  // or null: g is 0
  const Affine& affine;
  const OfStatistics& of_statistics;
  bool relu, reads_x, has_statistics;
  const Partials& partials;
};

template <class Channels, int W, class T, bool kReduces>
DFQ_INLINE void backward_tile(const Backward& job, const Tile& t) {
  alignas(64) T x_buffer[kBuffer], dx_buffer[kBuffer], dy_buffer[kBuffer];
  Lines<const T> x = {}, dy = {};
  if (job.reads_x) {
    x = job.tiling.gather(0, t, static_cast<const T*>(job.x), x_buffer);
  }
  if (job.dy) {
    dy = job.tiling.gather(2, t, static_cast<const T*>(job.dy), dy_buffer);
  }
  // what is not there changes nothing; the other stands in for it
  x = job.reads_x ? x : dy;
  dy = job.dy ? dy : x;
  const auto dx = job.tiling.target(1, t, static_cast<T*>(job.dx), dx_buffer);
  const AffineLanes<Channels> of(job.affine, t);
  const OfStatisticsLanes<Channels> stats(job.of_statistics, t);
  const auto all = words<W>(job.dy && !job.relu ? ~0u : 0u);
  const auto low = floats<W>(job.dy ? 0.0f : INFINITY);
  const auto has_stats = words<W>(job.has_statistics ? ~0u : 0u);
  typename Channels::template Totals<2> totals(t);
  Channels::walk(
      t, totals, [&](auto part, int64_t line, int64_t i, int64_t lane, auto& sums) DFQ_LAMBDA {
        const auto v = load<W>(x.at(line, i));
        const auto d = v - of.shift[lane];
        // not where(): a load under a mask waits for the mask, and so for x
        const auto passes = all | bits_as<uint32_t>(d * of.scale[lane] + of.bias[lane] > low);
        const auto g = bits_as<float>(passes & bits_as<uint32_t>(load<W>(dy.at(line, i))));
        if constexpr (kReduces) {
          sums.value[0] = sums.value[0] + part.keep(g * d);
          sums.value[1] = sums.value[1] + part.keep(g);
        }
        const auto rest = stats.offset[lane] + stats.slope[lane] * (v - stats.mean[lane]);
        const auto masked = bits_as<float>(has_stats & bits_as<uint32_t>(rest));
        store(dx.at(line, i), g * of.scale[lane] + masked);
      });
  job.tiling.scatter(1, t, dx_buffer, static_cast<T*>(job.dx));
  for (int64_t c = 0; kReduces && c < t.channels; ++c) {
    job.partials.at(t.group, 0)[t.channel + c] = totals.of_channel(0, c, t);
    job.partials.at(t.group, 1)[t.channel + c] = totals.of_channel(1, c, t);
  }
}

template <class T, bool kReduces>
struct BackwardTiles {
  template <int W>
  static DFQ_INLINE void run(const Backward* job, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tile t = job->tiling.tile(i);
      if (job->tiling.interleaved()) {
        backward_tile<ManyChannels<W>, W, T, kReduces>(*job, t);
      } else {
        backward_tile<OneChannel<W>, W, T, kReduces>(*job, t);
      }
    }
  }
};

}  // namespace dfq

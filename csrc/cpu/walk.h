// A walk over the lines of a tile, sixteen elements at a time, with sums over each channel.
#pragma once

#include <algorithm>
#include <cstring>

#include "narrow.h"
#include "tiles.h"

namespace dfq {

#define DFQ_LAMBDA __attribute__((always_inline))

// N sums for each of sixteen lanes.
template <int W, int N>
struct Sums {
  Floats<W> value[N];

  DFQ_INLINE Sums() {
    for (Floats<W>& sum : value) {
      sum = floats<W>(0);
    }
  }
};

// What of sixteen elements counts in the sums: all, or the lanes of the mask.
struct Whole {
  template <int W>
  DFQ_INLINE Floats<W> keep(Floats<W> values) const {
    return values;
  }
};

template <int W>
struct Part {
  Words<W> mask;

  DFQ_INLINE Part(int64_t begin, int64_t end) {
    uint32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      lanes[i] = begin <= i && i < end ? ~0u : 0u;
    }
    load_plain(lanes, mask);
  }
  DFQ_INLINE Floats<W> keep(Floats<W> values) const {
    return bits_as<float>(bits_as<uint32_t>(values) & mask);
  }
};

template <int N, int W>
DFQ_INLINE void add_to(double* totals, Block<float, N, W> values) {
  if constexpr (N == W) {
    native<double, W> total;
    std::memcpy(&total, totals, sizeof(total));
    total += __builtin_convertvector(values.v, native<double, W>);
    std::memcpy(totals, &total, sizeof(total));
  } else {
    add_to(totals, values.lo);
    add_to(totals + N / 2, values.hi);
  }
}

// N float64 sums for each lane of a tile. The float32 sums of kSteps steps are added to them, so
// that the error does not grow with the tile.
constexpr int kSteps = 8;

template <int N, int64_t kWidth>
struct LaneTotals {
  int64_t width;
  double value[N][kWidth];

  DFQ_INLINE explicit LaneTotals(int64_t lanes) : width(lanes) {
    for (auto& totals : value) {
      std::fill(totals, totals + width, 0.0);
    }
  }
  template <int W>
  DFQ_INLINE void add(Sums<W, N>& sums, int64_t lane) {
    for (int j = 0; j < N; ++j) {
      add_to(value[j] + lane, sums.value[j]);
    }
    sums = Sums<W, N>();
  }
  DFQ_INLINE double of_channel(int j, int64_t c, const Tile& t) const {
    double total = 0;
    for (int64_t lane = c; lane < width; lane += t.channels) {
      total += value[j][lane];
    }
    return total;
  }
};

// Tiles of one channel: all lanes are its.
template <int W>
struct OneChannel {
  // The channel's value in every lane.
  struct Value {
    Floats<W> value;

    DFQ_INLINE Value(const float* channel, const Tile&) : value(floats<W>(*channel)) {}
    DFQ_INLINE Floats<W> operator[](int64_t) const { return value; }
  };

  template <int N>
  struct Totals : LaneTotals<N, kLanes> {
    DFQ_INLINE explicit Totals(const Tile&) : LaneTotals<N, kLanes>(kLanes) {}
  };

  // body(part, line, i, lane, sums) for the elements i .. i + 15 of a line, the first of them in
  // `lane`. An element may come twice; it counts in the sums once.
  template <int N, class Body>
  static DFQ_INLINE void walk(const Tile& t, Totals<N>& totals, const Body& body) {
    const int64_t whole = t.width / kLanes * kLanes;
    const Part<W> last(kLanes - (t.width - whole), kLanes);
    Sums<W, N> sums;
    int steps = 0;
    for (int64_t line = 0; line < t.lines; ++line) {
      for (int64_t i = 0; i < whole; i += kLanes) {
        body(Whole(), line, i, 0, sums);
        if (++steps % kSteps == 0) {
          totals.add(sums, 0);
        }
      }
      if (whole < t.width) {
        body(last, line, t.width - kLanes, 0, sums);
      }
    }
    totals.add(sums, 0);
  }
};

// Tiles of several channels: the lanes of a line are its channels, once or more.
template <int W>
struct ManyChannels {
  // Each lane's channel's value.
  struct Value {
    alignas(64) float value[kMaxWidth];

    DFQ_INLINE Value(const float* channels, const Tile& t) {
      for (int64_t lane = 0; lane < t.width; lane += t.channels) {
        std::memcpy(value + lane, channels, t.channels * sizeof(float));
      }
    }
    DFQ_INLINE Floats<W> operator[](int64_t lane) const { return load<W>(value + lane); }
  };

  template <int N>
  struct Totals : LaneTotals<N, kMaxWidth> {
    DFQ_INLINE explicit Totals(const Tile& t) : LaneTotals<N, kMaxWidth>(t.width) {}
  };

  // As for one channel, column by column, so that the sums stay in registers.
  template <int N, class Body>
  static DFQ_INLINE void walk(const Tile& t, Totals<N>& totals, const Body& body) {
    constexpr int kTogether = W / 4;
    const int64_t whole = t.last == t.width ? t.lines : t.lines - 1;
    int64_t lane = 0;
    for (; lane + kTogether * kLanes <= t.width; lane += kTogether * kLanes) {
      column<kTogether>(Whole(), 0, whole, lane, totals, body);
    }
    for (; lane + kLanes <= t.width; lane += kLanes) {
      column<1>(Whole(), 0, whole, lane, totals, body);
    }
    if (lane < t.width) {
      const Part<W> last(lane + kLanes - t.width, kLanes);
      column<1>(last, 0, whole, t.width - kLanes, totals, body);
    }
    for (lane = 0; whole < t.lines && lane < t.last; lane += kLanes) {
      column<1>(Part<W>(0, t.last - lane), whole, t.lines, lane, totals, body);
    }
  }

 private:
  // kTogether times sixteen lanes of the lines begin .. end - 1.
  template <int kTogether, int N, class Counted, class Body>
  static DFQ_INLINE void column(const Counted& part, int64_t begin, int64_t end, int64_t lane,
                                Totals<N>& totals, const Body& body) {
    Sums<W, N> sums[kTogether];
    while (begin < end) {
      const int64_t stop = std::min(end, begin + kSteps);
      for (; begin < stop; ++begin) {
#pragma GCC unroll 4
        for (int u = 0; u < kTogether; ++u) {
          body(part, begin, lane + u * kLanes, lane + u * kLanes, sums[u]);
        }
      }
      for (int u = 0; u < kTogether; ++u) {
        totals.add(sums[u], lane + u * kLanes);
      }
    }
  }
};

}  // namespace dfq

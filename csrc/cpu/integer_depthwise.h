// A depthwise integer convolution: sixteen channels of an image at a time, row by row.
//
// Each row of the input is first brought into quads: for every output column and every four taps
// of a filter row, the four uint8 (x plus 128, or padding) of each channel side by side, as a dot
// product of four wants them. All rows of the filter then read the same quads, from a ring.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "common.h"
#include "integer_conv.h"

namespace dfq {

// One image and one block of channels; sizes along height (0) and width (1).
struct DepthwiseWork {
  const Job& job;
  int64_t image, block, channels;  // of the block
  int64_t out[2], quads, ring_rows;
  const int8_t* ones;  // as the block's weights; null if weights have no zeros

  DepthwiseWork(const Job& job, int64_t image, int64_t block, const int8_t* ones)
      : job(job),
        image(image),
        block(block),
        channels(std::min<int64_t>(kLanes, job.shape.channels - block * kLanes)),
        out{job.shape.out_size(0), job.shape.out_size(1)},
        quads(job.weights.filter.quads()),
        ring_rows((job.shape.kernel[0] - 1) * job.shape.dilation[0] + 1),
        ones(ones) {}

  DFQ_INLINE int64_t row_bytes() const { return quads * out[1] * kWordBytes; }
  int64_t ring_bytes() const { return ring_rows * row_bytes(); }
  // Columns from the first of the padding to the last that a quad may read.
  DFQ_INLINE int64_t columns() const {
    return (out[1] - 1) * job.shape.stride[1] + (4 * quads - 1) * job.shape.dilation[1] + 1;
  }
};

class QuadRow {
 public:
  // Row v of the input, counted from the first row of padding, into `to`; `row` is for its columns
  // as uint8, [columns, 16].
  template <int W>
  static DFQ_INLINE void build(const DepthwiseWork& work, int64_t v, uint8_t* row, uint8_t* to) {
    copy(work, v, row);
    const int64_t step = work.job.shape.stride[1] * kLanes, width = work.out[1];
    const int64_t dilation = work.job.shape.dilation[1] * kLanes, quads = work.quads;
    for (int64_t q = 0; q < quads; ++q) {
      const uint8_t* from = row + 4 * q * dilation;
      for (int64_t column = 0; column < width; ++column, from += step, to += kWordBytes) {
        interleave<W>(from, dilation, to);
      }
    }
  }

 private:
  using Bytes = native<uint8_t, 16>;
  using Shorts = native<uint16_t, 8>;

  static DFQ_INLINE void copy(const DepthwiseWork& work, int64_t v, uint8_t* to) {
    const Convolution& shape = work.job.shape;
    const int64_t row = v - shape.padding[0], left = shape.padding[1], columns = work.columns();
    const int64_t width = row < 0 || row >= shape.size[0] ? 0 : shape.size[1];
    const int64_t begin = std::min(left, columns), end = std::min(left + width, columns);
    fill(to, shape.x_zero + 128, begin);
    const int64_t stride = shape.channels, channels = work.channels;
    const int8_t* from = work.job.x + work.block * kLanes +
                         (work.image * shape.size[0] + row) * shape.size[1] * stride;
    const int64_t next_row = shape.size[1] * stride;
    for (int64_t column = begin; column < end; ++column, from += stride) {
      __builtin_prefetch(from + next_row);  // sixteen bytes here and there: no line comes by itself
      Bytes bytes{};
      if (channels == kLanes) {
        std::memcpy(&bytes, from, kLanes);
      } else {
        std::memcpy(&bytes, from, channels);
      }
      bytes ^= 0x80;
      std::memcpy(to + column * kLanes, &bytes, kLanes);
    }
    const int64_t rest = std::max(begin, end);
    fill(to + rest * kLanes, shape.x_zero + 128, columns - rest);
  }

  // A few columns, for which a call of memset would take longer.
  static DFQ_INLINE void fill(uint8_t* to, int32_t value, int64_t columns) {
    Bytes bytes;
    std::memset(&bytes, value, sizeof(bytes));
    for (int64_t column = 0; column < columns; ++column) {
      std::memcpy(to + column * kLanes, &bytes, sizeof(bytes));
    }
  }

  static DFQ_INLINE Shorts low(Bytes a, Bytes b) {
    return (Shorts)__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                           23);
  }
  static DFQ_INLINE Shorts high(Bytes a, Bytes b) {
    return (Shorts)__builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                           30, 15, 31);
  }
  static DFQ_INLINE void store_pairs(Shorts a, Shorts b, uint8_t* to) {
    const Shorts first = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    const Shorts second = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    std::memcpy(to, &first, sizeof(first));
    std::memcpy(to + sizeof(first), &second, sizeof(second));
  }

  // Sixteen channels of four pixels to the four of each channel side by side.
  template <int W>
  static DFQ_INLINE void interleave(const uint8_t* from, int64_t step, uint8_t* to) {
    if (W == kLanes && step == kLanes) {
      transpose(from, to, std::make_integer_sequence<int, kLanes>(),
                std::make_integer_sequence<int, 4 * kLanes>());
      return;
    }
    Bytes a, b, c, d;
    std::memcpy(&a, from, sizeof(a));
    std::memcpy(&b, from + step, sizeof(b));
    std::memcpy(&c, from + 2 * step, sizeof(c));
    std::memcpy(&d, from + 3 * step, sizeof(d));
    store_pairs(low(a, b), low(c, d), to);
    store_pairs(high(a, b), high(c, d), to + 2 * sizeof(a));
  }

  // The same for neighbours, in two permutations: of words among all, of bytes within sixteen.
  template <int... I, int... J>
  static DFQ_INLINE void transpose(const uint8_t* from, uint8_t* to,
                                   std::integer_sequence<int, I...>,
                                   std::integer_sequence<int, J...>) {
    native<uint32_t, 16> words;
    std::memcpy(&words, from, sizeof(words));
    words = __builtin_shufflevector(words, words, (I % 4 * 4 + I / 4)...);
    auto bytes = (native<uint8_t, 64>)words;
    bytes = __builtin_shufflevector(bytes, bytes, (J / 16 * 16 + J % 4 * 4 + J % 16 / 4)...);
    std::memcpy(to, &bytes, sizeof(bytes));
  }
};

template <class T, bool kResidual>
struct ConvolveDepthwise {
  template <class Dot>
  static DFQ_INLINE void run(const DepthwiseWork* work, uint8_t* ring, uint8_t* row,
                             const uint8_t** runs, T* to) {
    const BlockOutput<Dot::W, T, kResidual> out(work->job.output, to, work->block, work->channels);
    convolve<Dot>(*work, out, ring, row, runs);
  }

 private:
  static constexpr int kTogether = 4;  // pixels, so that their sums do not wait for each other

  template <class Dot, class Out>
  static DFQ_INLINE void convolve(const DepthwiseWork& work, const Out& out, uint8_t* ring,
                                  uint8_t* row_buffer, const uint8_t** runs) {
    const Convolution& shape = work.job.shape;
    const int64_t stride = shape.stride[0], height = work.out[0], ring_rows = work.ring_rows;
    const int64_t row_bytes = work.row_bytes(), quad_bytes = work.out[1] * kWordBytes;
    int64_t built = 0;
    for (int64_t row = 0; row < height; ++row) {
      const int64_t end = row * stride + ring_rows;
      for (int64_t v = std::max(built, row * stride); v < end; ++v) {
        QuadRow::build<Dot::W>(work, v, row_buffer, ring + v % ring_rows * row_bytes);
      }
      built = end;
      for (int64_t r = 0; r < shape.kernel[0]; ++r) {
        const int64_t v = row * stride + r * shape.dilation[0];
        for (int64_t q = 0; q < work.quads; ++q) {
          runs[r * work.quads + q] = ring + v % ring_rows * row_bytes + q * quad_bytes;
        }
      }
      work.job.weights.filter.words() == 3 ? convolve_row<Dot, 3>(work, row, runs, out)
                                           : convolve_row<Dot, 0>(work, row, runs, out);
    }
  }

  // kRuns is how many runs there are, if that is known here.
  template <class Dot, int kRuns, class Out>
  static DFQ_INLINE void convolve_row(const DepthwiseWork& work, int64_t row,
                                      const uint8_t* const* runs, const Out& out) {
    const int64_t width = work.out[1], channels = work.job.shape.channels;
    const int64_t first = (work.image * work.out[0] + row) * width * channels + work.block * kLanes;
    alignas(64) int32_t sums[kTogether * kLanes];
    if (width < kTogether) {
      for (int64_t column = 0; column < width; ++column) {
        sum_pixels<Dot, 1, kRuns>(work, runs, column, sums);
        out.store(sums, kLanes, 1, first + column * channels, channels);
      }
      return;
    }
    for (int64_t done = 0; done < width; done += kTogether) {
      const int64_t column = std::min(done, width - kTogether);  // some are computed twice
      sum_pixels<Dot, kTogether, kRuns>(work, runs, column, sums);
      out.store(sums, kLanes, kTogether, first + column * channels, channels);
    }
  }

  // The sums of kPixels neighbours: [kPixels, 16].
  template <class Dot, int kPixels, int kRuns>
  static DFQ_INLINE void sum_pixels(const DepthwiseWork& work, const uint8_t* const* runs,
                                    int64_t column, int32_t* out) {
    const Job& job = work.job;
    const int8_t* weights = job.prepacked + work.block * job.weights.block_bytes();
    const int64_t count = kRuns ? kRuns : job.weights.filter.words();
    accumulate<Dot, kPixels>(runs, count, column, weights, job.start + work.block * kLanes, out);
    if (work.ones) {
      const int32_t none[kLanes] = {};
      int32_t windows[kPixels * kLanes];
      accumulate<Dot, kPixels>(runs, count, column, work.ones, none, windows);
      subtract_zeros<kPixels>(work, windows, out);
    }
  }

  template <class Dot, int kPixels>
  static DFQ_INLINE void accumulate(const uint8_t* const* runs, int64_t count, int64_t column,
                                    const int8_t* weights, const int32_t* start, int32_t* out) {
    typename Dot::Sums sums[kPixels];
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) {
      Dot::load(start, sums[p]);
    }
#pragma GCC unroll 3
    for (int64_t run = 0; run < count; ++run) {
      const uint8_t* from = runs[run] + column * kWordBytes;
      const typename Dot::Weights taps(weights + run * kWordBytes);
#pragma GCC unroll 4
      for (int p = 0; p < kPixels; ++p) {
        sums[p] = Dot::add_lanes(sums[p], from + p * kWordBytes, taps);
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < kPixels; ++p) {
      Dot::store(out + p * kLanes, sums[p]);
    }
  }

  template <int kPixels>
  static DFQ_INLINE void subtract_zeros(const DepthwiseWork& work, const int32_t* windows,
                                        int32_t* sums) {
    const Job& job = work.job;
    const int32_t* zeros = job.output.weight_zero + work.block * kLanes;
    const int64_t of_zeros = job.weights.filter.elements() * (128 + job.shape.x_zero);
    for (int i = 0; i < kPixels * kLanes; ++i) {
      const uint32_t window = static_cast<uint32_t>(windows[i] - of_zeros);
      sums[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) - window * zeros[i % kLanes]);
    }
  }
};

inline void convolve_depthwise(const Job& job) {
  const Filter& filter = job.weights.filter;
  const int64_t blocks = filter.blocks();
  const auto ones = job.output.weight_zero ? ones_block(filter) : std::vector<int8_t>();
  const int8_t* zeros = ones.empty() ? nullptr : ones.data();
  torch::stable::parallel_for(0, job.shape.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    const DepthwiseWork any(job, 0, 0, zeros);
    std::vector<uint8_t> ring(any.ring_bytes()), row(any.columns() * kLanes);
    std::vector<const uint8_t*> runs(filter.runs());
    with_output(job.output, [&](auto residual, auto* to) {
      using Kernel =
          ConvolveDepthwise<std::remove_pointer_t<decltype(to)>, decltype(residual)::value>;
      for (int64_t i = begin; i < end; ++i) {
        const DepthwiseWork work(job, i / blocks, i % blocks, zeros);
        run_dot<Kernel>(&work, ring.data(), row.data(), runs.data(), to);
      }
    });
  });
}

}  // namespace dfq

// The inner loops of an integer convolution: a tile of pixels by one or two blocks of sixteen
// channels, whose sums stay in registers while K is read once.
#pragma once

#include <cstdint>

#include "common.h"
#include "dot.h"
#include "integer_output.h"
#include "integer_weights.h"

namespace dfq {

// Registers for the sums of one block; 32 vectors of v4 leave two blocks fourteen pixels.
template <class Dot>
constexpr int kTilePixels = Dot::W == 16 ? 14 : 4;
constexpr int kMostBlocks = 2;

// What a panel of one or two blocks needs of its input: pixels and K as offsets in bytes.
struct Reading {
  const uint8_t* input;
  const int32_t* pixels;  // where each output pixel's window begins
  int64_t pixel_count;
  const int64_t* runs;  // where in a window each run begins
  int64_t run_count, run_words;
};

struct Panel {
  int64_t blocks;  // 1 or 2
  const int8_t* weights[kMostBlocks];
  const int32_t* start[kMostBlocks];  // what the sums begin with, sixteen each
};

// The sums of kPixels pixels from `pixel` on: [kPixels, kBlocks, 16].
template <class Dot, int kPixels, int kBlocks>
DFQ_INLINE void sum_tile(const Reading& in, const Panel& panel, int64_t pixel, int32_t* out) {
  typename Dot::Sums sums[kPixels][kBlocks];
  const int8_t* weights[kBlocks];
  int64_t offset[kPixels];
#pragma GCC unroll 2
  for (int b = 0; b < kBlocks; ++b) {
    weights[b] = panel.weights[b];
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) {
      Dot::load(panel.start[b], sums[p][b]);
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p) {
    offset[p] = in.pixels[pixel + p];
  }
  for (int64_t run = 0; run < in.run_count; ++run) {
    const uint8_t* input = in.input + in.runs[run];
    for (int64_t word = 0; word < in.run_words; ++word, input += 4) {
      if constexpr (kBlocks == 1) {
        const typename Dot::Weights first(weights[0]);
        weights[0] += kWordBytes;
#pragma GCC unroll 16
        for (int p = 0; p < kPixels; ++p) {
          sums[p][0] = Dot::add(sums[p][0], typename Dot::Pixel(input + offset[p]), first);
        }
      } else {
        const typename Dot::Weights first(weights[0]), second(weights[1]);
        weights[0] += kWordBytes;
        weights[1] += kWordBytes;
#pragma GCC unroll 16
        for (int p = 0; p < kPixels; ++p) {
          const typename Dot::Pixel bytes(input + offset[p]);
          sums[p][0] = Dot::add(sums[p][0], bytes, first);
          sums[p][1] = Dot::add(sums[p][1], bytes, second);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      Dot::store(out + (p * kBlocks + b) * kLanes, sums[p][b]);
    }
  }
}

// The outputs of a panel: channels `channel` .. of the pixels from `first_pixel` on.
struct Writing {
  const Output* output;
  const int32_t* window_sums;  // for each pixel, less what they are of zeros; null without zeros
  int64_t first_pixel, row;    // of the output; its channels
  int64_t block, channel, channels;
};

// An output panel of all pixels, tile by tile; the last begins early enough to be a whole one. A
// function for each kind of panel and output: in one for all the sums would not stay in registers.
template <int kBlocks, class T, bool kResidual>
struct ConvolvePanel {
  template <class Dot>
  static DFQ_INLINE void run(const Reading* in, const Panel* panel, const Writing* out, T* to) {
    constexpr int kMost = kTilePixels<Dot>, kFew = 4;
    if (kMost > kFew && in->pixel_count >= kMost) {
      tiles<Dot, kMost>(*in, *panel, *out, to);
    } else if (in->pixel_count >= kFew) {
      tiles<Dot, kFew>(*in, *panel, *out, to);
    } else {
      tiles<Dot, 1>(*in, *panel, *out, to);
    }
  }

 private:
  template <class Dot, int kPixels>
  static DFQ_INLINE void tiles(const Reading& in, const Panel& panel, const Writing& out, T* to) {
    alignas(64) int32_t sums[kPixels * kBlocks * kLanes];
    for (int64_t done = 0; done < in.pixel_count; done += kPixels) {
      const int64_t pixel = done + kPixels <= in.pixel_count ? done : in.pixel_count - kPixels;
      sum_tile<Dot, kPixels, kBlocks>(in, panel, pixel, sums);
      if (out.window_sums) {
        subtract_zeros<kPixels>(out, pixel, sums);
      }
      const int64_t at = (out.first_pixel + pixel) * out.row + out.channel;
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) {
        const BlockOutput<Dot::W, T, kResidual> block(*out.output, to, out.block + b,
                                                      out.channels - b * kLanes);
        block.store(sums + b * kLanes, kBlocks * kLanes, kPixels, at + b * kLanes, out.row);
      }
    }
  }

  template <int kPixels>
  static DFQ_INLINE void subtract_zeros(const Writing& out, int64_t pixel, int32_t* sums) {
    const int32_t* zeros = out.output->weight_zero + out.block * kLanes;
    for (int p = 0; p < kPixels; ++p) {
      const uint32_t window = out.window_sums[pixel + p];
      for (int i = 0; i < kBlocks * kLanes; ++i, ++sums) {
        *sums = static_cast<int32_t>(static_cast<uint32_t>(*sums) - window * zeros[i]);
      }
    }
  }
};

// The sum of each pixel's window, by weights of one in every place.
struct SumWindows {
  template <class Dot>
  static DFQ_INLINE void run(const Reading* in, const Panel* ones, int32_t minus, int32_t* out) {
    int32_t sums[kLanes];
    for (int64_t pixel = 0; pixel < in->pixel_count; ++pixel) {
      sum_tile<Dot, 1, 1>(*in, *ones, pixel, sums);
      out[pixel] = sums[0] - minus;
    }
  }
};

}  // namespace dfq

// Float activations to int8, in channels_last memory whatever the layout of the input: one pass.
// The specification is dfq_kernels/quantize.py; the integers are equal to it.
#include <algorithm>
#include <type_traits>

#include "core/requantize.h"
#include "quantize.h"
#include "vectors.h"

namespace dfq {
namespace {

constexpr int kLogThreads = 8, kThreads = 1 << kLogThreads;
constexpr int kVectors = 4;     // that a thread loads before it waits
constexpr int kFour = 4;        // integers in a word
constexpr int kMostQuads = 16;  // of channels in a tile
constexpr int kPad = 4;         // bytes: lanes with other pixels meet other banks

int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The grid as integers are stored.
struct Stored {
  float inverse;
  int32_t zero, low, high;

  DFQ_DEVICE explicit Stored(const Codes& codes) {
    const Grid<float> grid = codes.quantizer.grid(0);
    const int64_t least = codes.quantizer.quant_min;
    inverse = grid.inverse;
    zero = static_cast<int32_t>(least - static_cast<int64_t>(grid.low) - codes.offset);
    low = static_cast<int32_t>(least - codes.offset);
    high = static_cast<int32_t>(codes.quantizer.quant_max - codes.offset);
  }
  DFQ_DEVICE uint32_t byte(float x) const {
    return static_cast<uint8_t>(requantize(x * inverse, zero, low, high));
  }
  DFQ_DEVICE uint32_t word(float a, float b, float c, float d) const {
    return byte(a) | byte(b) << 8 | byte(c) << 16 | byte(d) << 24;
  }
};

// The first `count` bytes of a word, at an address that is a multiple of 4.
DFQ_DEVICE void store_word(int8_t* to, uint32_t word, int64_t count) {
  if (count >= kFour) {
    DFQ_ASSERT_ALIGNED(to, kFour);
    *reinterpret_cast<uint32_t*>(to) = word;
    return;
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    if (i < count) {
      to[i] = static_cast<int8_t>(word >> 8 * i);
    }
  }
}

// The vector of a plane at `pixel`, or what there is of it.
template <class T>
DFQ_DEVICE uint4 load(const T* plane, int pixel, int pixels, bool vectors) {
  if (vectors && pixel + kLanes<T> <= pixels) {
    return load_vector(plane + pixel);
  }
  return gather<T>(pixels - pixel, [&](int i) { return plane[pixel + i]; });
}

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_same(const Codes codes) {
  constexpr int kStep = kThreads * kLanes<T>, kBlock = kStep * kVectors;
  const T* x = static_cast<const T*>(codes.x);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kBlock;
  const Stored grid(codes);
  if (begin + kBlock > codes.count) {
    DFQ_ROLLED
    for (int64_t i = begin + threadIdx.x; i < codes.count; i += kThreads) {
      codes.out[i] = static_cast<int8_t>(grid.byte(to_float(x[i])));
    }
    return;
  }
  const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * kLanes<T>;
  uint4 vectors[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    vectors[i] = load_vector(x + first + i * kStep);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    float values[kLanes<T>];
    unpack<T>(vectors[i], values);
    int8_t* to = codes.out + first + i * kStep;
    const uint32_t low = grid.word(values[0], values[1], values[2], values[3]);
    if constexpr (kLanes<T> == kFour) {
      *reinterpret_cast<uint32_t*>(to) = low;
    } else {
      const uint64_t high = grid.word(values[4], values[5], values[6], values[7]);
      *reinterpret_cast<uint64_t*>(to) = high << 32 | low;
    }
  }
}

// How planes [B, C, P] are cut into tiles. A thread has a vector of pixels of a quad, four
// channels.
struct Planes {
  int log_quads = 0;     // of a tile
  int64_t across, down;  // tiles of the channels, and of the pixels of an image

  Planes(const Codes& codes, int lanes) {
    while ((1 << log_quads) < kMostQuads && channels() < codes.channels) {
      ++log_quads;
    }
    across = quotient_up(codes.channels, channels());
    down = quotient_up(codes.pixels, columns() * lanes);
  }
  DFQ_HOST_DEVICE int channels() const { return kFour << log_quads; }
  DFQ_HOST_DEVICE int columns() const { return kThreads >> log_quads; }  // vectors of pixels
};

// A tile in shared memory. At most four channels lie there as in the output, otherwise each pixel
// begins at a multiple of 4 bytes.
template <class T>
class PlaneTile {
 public:
  static constexpr int kWords = kThreads * kLanes<T> + kThreads / 2 * kLanes<T> * kPad / kFour;

  DFQ_DEVICE PlaneTile(const Codes& codes, const Planes& planes, int8_t* memory)
      : codes_(codes), memory_(memory), log_quads_(planes.log_quads) {
    const int64_t row = quotient(blockIdx.x, planes.across);
    image_ = quotient(row, planes.down);
    first_channel_ = (blockIdx.x - row * planes.across) * planes.channels();
    first_pixel_ = (row - image_ * planes.down) * (planes.columns() * kLanes<T>);
    channels_ = at_most(codes.channels - first_channel_, planes.channels());
    pixels_ = at_most(codes.pixels - first_pixel_, planes.columns() * kLanes<T>);
    together_ = codes.channels <= kFour;
    pitch_ = together_ ? channels_ : planes.channels() + kPad;
  }

  DFQ_DEVICE void read() const {
    const int thread = static_cast<int>(threadIdx.x), quad = thread << log_quads_ >> kLogThreads;
    const int pixel = (thread & ((kThreads >> log_quads_) - 1)) * kLanes<T>;
    const T* x = static_cast<const T*>(codes_.x) + image_ * codes_.batch_stride + first_pixel_ +
                 (first_channel_ + quad * kFour) * codes_.channel_stride;
    uint4 vectors[kFour] = {};
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      if (quad * kFour + i < channels_ && pixel < pixels_) {
        vectors[i] = load(x + i * codes_.channel_stride, pixel, pixels_, codes_.vectors);
      }
    }
    const Stored grid(codes_);
    float values[kFour][kLanes<T>];
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      unpack<T>(vectors[i], values[i]);
    }
#pragma unroll
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      store_word(memory_ + (pixel + lane) * pitch_ + quad * kFour,
                 grid.word(values[0][lane], values[1][lane], values[2][lane], values[3][lane]),
                 together_ ? channels_ : kFour);
    }
  }

  // In words, if each line of the output begins at a multiple of 4.
  DFQ_DEVICE void write() const {
    const int64_t step = codes_.channels * (together_ ? codes_.pixels : 1);
    step % kFour == 0 ? write_units<uint32_t>(step) : write_units<int8_t>(step);
  }

 private:
  DFQ_DEVICE static int at_most(int64_t value, int most) {
    return value < most ? static_cast<int>(value) : most;
  }

  template <class Unit>
  DFQ_DEVICE void write_units(int64_t step) const {
    int8_t* out = codes_.out + (image_ * codes_.pixels + first_pixel_) * codes_.channels;
    const int log_line = log_quads_ + (sizeof(Unit) == 1 ? 2 : 0);
    const int bytes = channels_ * (together_ ? pixels_ : 1);
    const int units = together_ ? bytes / static_cast<int>(sizeof(Unit)) : pixels_ << log_line;
    DFQ_ROLLED
    for (int i = static_cast<int>(threadIdx.x); i < units; i += kThreads) {
      const int line = together_ ? 0 : i >> log_line;
      const int at = (i - (line << log_line)) * static_cast<int>(sizeof(Unit));
      if (at < bytes) {
        int8_t* to = out + first_channel_ + line * step + at;
        const int8_t* from = memory_ + line * pitch_ + at;
        DFQ_ASSERT_ALIGNED(to, sizeof(Unit));
        DFQ_ASSERT_ALIGNED(from, sizeof(Unit));
        *reinterpret_cast<Unit*>(to) = *reinterpret_cast<const Unit*>(from);
      }
    }
  }

  const Codes& codes_;
  int8_t* memory_;
  int log_quads_;
  int64_t image_, first_channel_, first_pixel_;
  int channels_, pixels_;  // that there are
  bool together_;
  int pitch_;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    quantize_planes(const Codes codes, const Planes planes) {
  DFQ_SHARED(uint32_t, words, PlaneTile<T>::kWords);
  const PlaneTile<T> tile(codes, planes, reinterpret_cast<int8_t*>(words));
  tile.read();
  __syncthreads();
  tile.write();
}

__global__ void __launch_bounds__(kThreads) quantize_any(const Codes codes) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kFour;
  const Stored grid(codes);
  uint32_t word = 0;
  DFQ_ROLLED
  for (int i = 0; i < kFour && first + i < codes.count; ++i) {
    const int64_t at = codes.strides.offset(0, first + i);
    const float x = codes.storage == Storage::kFloat ? static_cast<const float*>(codes.x)[at]
                    : codes.storage == Storage::kHalf
                        ? to_float(static_cast<const Half*>(codes.x)[at])
                        : to_float(static_cast<const BFloat16*>(codes.x)[at]);
    word |= grid.byte(x) << 8 * i;
  }
  store_word(codes.out + first, word, codes.count - first);
}

}  // namespace

Failure quantize(const Codes& codes, void* stream) {
  if (codes.order == Order::kAny) {
    return launch(&quantize_any, quotient_up(codes.count, kThreads * kFour), kThreads, stream,
                  codes);
  }
  return with_storage(codes.storage, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (codes.order == Order::kSame) {
      return launch(&quantize_same<T>, quotient_up(codes.count, kThreads * kVectors * kLanes<T>),
                    kThreads, stream, codes);
    }
    const Planes planes(codes, kLanes<T>);
    return launch(&quantize_planes<T>, codes.batch * planes.down * planes.across, kThreads, stream,
                  codes, planes);
  });
}

}  // namespace dfq

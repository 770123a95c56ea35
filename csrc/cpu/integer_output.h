// From int32 sums to outputs: scale, bias, residual, ReLU, and float32 or int8 (core/requantize.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "bytes.h"
#include "common.h"
#include "core/requantize.h"

namespace dfq {

// Of one call; the arrays hold a value for each channel of each block of sixteen.
struct Output {
  const float* multiplier;
  const float* bias;
  const int32_t* weight_zero;  // null if all are 0
  const int8_t* residual;      // laid out as the output is; null if there is none
  float residual_multiplier;
  int32_t residual_zero;
  float floor;              // what is less becomes this: 0 for ReLU, otherwise -inf
  int32_t zero, low, high;  // of the int8 output
  float* floats;            // where the output goes, one of the two
  int8_t* bytes;
};

// f(std::bool_constant<there is a residual>, pointer to the output).
template <class F>
void with_output(const Output& output, const F& f) {
  if (output.bytes) {
    output.residual ? f(std::true_type(), output.bytes) : f(std::false_type(), output.bytes);
  } else {
    output.residual ? f(std::true_type(), output.floats) : f(std::false_type(), output.floats);
  }
}

// Sixteen channels of a block, for any number of pixels. T is the output's type.
template <int W, class T, bool kResidual>
struct BlockOutput {
  StoredGrid<W> grid;
  Floats<W> multiplier, bias, floor, residual_multiplier, residual_zero;
  const int8_t* residual;
  T* out;
  int64_t channels;  // that there are, of the sixteen

  DFQ_INLINE BlockOutput(const Output& output, T* out, int64_t block, int64_t channels)
      : grid(output.zero, output.low, output.high),
        multiplier(load<W>(output.multiplier + block * kLanes)),
        bias(load<W>(output.bias + block * kLanes)),
        floor(floats<W>(output.floor)),
        residual_multiplier(floats<W>(output.residual_multiplier)),
        residual_zero(floats<W>(static_cast<float>(output.residual_zero))),
        residual(output.residual),
        out(out),
        channels(channels) {}

  // The sums of `pixels` pixels, `step` integers apart; the first goes to `at` in the output, the
  // others `row` further each.
  DFQ_INLINE void store(const int32_t* sums, int64_t step, int64_t pixels, int64_t at,
                        int64_t row) const {
    if (channels >= kLanes) {
      for (int64_t p = 0; p < pixels; ++p, at += row) {
        store_sixteen(sums + p * step, residual + at, out + at);
      }
      return;
    }
    for (int64_t p = 0; p < pixels; ++p, at += row) {
      int8_t added[kLanes] = {};
      T values[kLanes];
      if constexpr (kResidual) {
        std::copy_n(residual + at, channels, added);
      }
      store_sixteen(sums + p * step, added, values);
      std::copy_n(values, channels, out + at);
    }
  }

 private:
  DFQ_INLINE void store_sixteen(const int32_t* sums, const int8_t* added, T* to) const {
    Integers<W> integers;
    load_plain(sums, integers);
    auto value = rescale(to_floats(integers), multiplier, bias);
    if constexpr (kResidual) {
      Integers<W> more;
      load_bytes(added, more);
      value = add_residual(value, to_floats(more) - residual_zero, residual_multiplier);
    }
    if constexpr (sizeof(T) == 1) {
      grid.store(to, value);  // its low is not below `floor`
    } else {
      dfq::store(to, at_least(value, floor));
    }
  }
};

}  // namespace dfq

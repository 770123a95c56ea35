// An integer layer on the device: what the ops qlinear and qconv2d hand to the kernels.
#pragma once

#include "core/windows.h"
#include "layout.h"

namespace dfq {

// [O], or null if all are 0.
template <class T>
struct PerChannel {
  const T* values;
  int64_t stride;

  DFQ_HOST_DEVICE T at(int64_t channel) const { return values ? values[channel * stride] : T{}; }
};

// From sums to outputs, [rows, channels]; packed is two 4-bit integers a byte along channels.
enum class OutputKind { kFloat, kInt8, kPacked };
struct IntegerOutput {
  OutputKind kind;
  void* y;
  int64_t rows, channels;
  PerChannel<float> multiplier, bias;
  const void* residual;  // laid out as int8 outputs are, or packed ones; null if there is none
  bool residual_packed;
  float residual_multiplier;
  int32_t residual_zero;
  bool relu;
  int32_t zero, low, high;  // of integers
  bool fours;               // whether four neighbouring channels of a group can be moved at a time
};

// The product of the rows that `windows` describes with the weights, in each group.
struct IntegerLayer {
  Windows windows;
  const uint8_t* x;
  bool x_packed;
  int32_t x_zero;
  int32_t row_bytes;  // of x along K: the taps of a window
  const uint8_t* weight;
  bool weight_packed;
  int32_t weight_row_bytes;
  PerChannel<int8_t> weight_zero;
  int32_t k;  // integers along K
  int32_t groups, group_channels;
  bool vectors;  // whether segments of 16 bytes of x and of the weights can be moved at a time
  IntegerOutput output;
};

Failure integer_gemm(const IntegerLayer& layer, void* stream);
Failure integer_gemm_of_packed(const IntegerLayer& layer, void* stream);

}  // namespace dfq

// fake_quantize and its backward on the device: what the ops hand to the kernels.
#pragma once

#include "layout.h"

namespace dfq {

// The quantizer of a tensor; scale and zero_point are on the device, one a channel.
struct Quantizer {
  const float* scale;
  const float* zero_point;
  int64_t scale_stride, zero_point_stride;
  int64_t quant_min, quant_max;

  DFQ_HOST_DEVICE Grid<float> grid(int64_t channel) const {
    return make_grid(scale[channel * scale_stride], zero_point[channel * zero_point_stride],
                     quant_min, quant_max);
  }
};

struct Drop {
  const int64_t* seed;  // on the device
  int32_t threshold;    // 0 drops nothing
};

// Null for what nobody needs.
struct QuantizerGradients {
  float* scale;
  float* zero_point;
  Pair<double>* partials;  // room for what the blocks sum

  bool needed() const { return scale || zero_point; }
};

Failure fake_quantize(const Layout& layout, const Quantizer& quantizer, const Drop& drop, void* y,
                      void* stream);

// x is input 0 of the layout and the gradient input 1.
Failure fake_quantize_backward(const Layout& layout, const Quantizer& quantizer, const Drop& drop,
                               void* dx, const QuantizerGradients& gradients, void* stream);

}  // namespace dfq

// batch_norm on the device: what the ops hand to the kernels.
#pragma once

#include "layout.h"

namespace dfq {

// A float32 for each channel on the device, or null for the same one everywhere.
struct ChannelValues {
  const float* values;
  int64_t stride;

  DFQ_HOST_DEVICE float at(int64_t channel, float otherwise) const {
    return values ? values[channel * stride] : otherwise;
  }
};

struct BatchNormArguments {
  ChannelValues running_mean, running_var, weight, bias;
  ChannelValues mean, grad_mean, grad_var;  // for backward
  double eps;
  int64_t count;  // elements of a channel
};

// What the walk reads of a channel: kRows rows of one float32 a channel.
struct ChannelTable {
  enum Row { kShift, kScale, kBias, kMean, kOffset, kSlope, kRows };
  float* values;
  int64_t channels;

  DFQ_HOST_DEVICE float& at(Row row, int64_t channel) const {
    return values[row * channels + channel];
  }
};

struct BatchNormForward {
  void* y;  // null: the statistics alone
  bool relu;
  float *mean, *var;
  ChannelTable table;
  Pair<double>* partials;
};

struct BatchNormBackward {
  void* dx;
  bool relu;
  bool has_grad, has_statistics;   // gradients of y; of mean or var
  float *grad_weight, *grad_bias;  // null if nobody needs them, and so is `partials`
  ChannelTable table;
  Pair<double>* partials;
};

Failure batch_norm(const Layout& layout, const BatchNormArguments& arguments,
                   const BatchNormForward& forward, void* stream);

// x is input 0 of the layout and the gradient of y input 1; without one anything may stand there.
Failure batch_norm_backward(const Layout& layout, const BatchNormArguments& arguments,
                            const BatchNormBackward& backward, void* stream);

}  // namespace dfq

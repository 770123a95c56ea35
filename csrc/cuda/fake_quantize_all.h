// fake_quantize of many tensors at a time, and its backward: what the ops hand to the kernels.
#pragma once

#include <vector>

#include "fake_quantize.h"

namespace dfq {

// One of the tensors; its layout is dense.
struct FakeQuantizeJob {
  Layout layout;
  Quantizer quantizer;
  void* out;                     // y, or in backward dx or null
  QuantizerGradients gradients;  // in backward
};

Failure fake_quantize_all(const std::vector<FakeQuantizeJob>& jobs, void* stream);
Failure fake_quantize_all_backward(const std::vector<FakeQuantizeJob>& jobs, void* stream);

}  // namespace dfq

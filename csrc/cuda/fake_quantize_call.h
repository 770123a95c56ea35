// The ops fake_quantize and fake_quantize_backward on one tensor, for ops made of them, and the
// checks of their arguments.
#pragma once

#include <tuple>

#include "fake_quantize.h"
#include "tensors.h"

namespace dfq {

Tensor fake_quantize_cuda(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                          int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                          double drop, OptionalTensor seed);

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis, double drop,
    OptionalTensor seed, bool needs_x, bool needs_scale, bool needs_zero_point);

inline Quantizer quantizer_of(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                              int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis) {
  const int64_t expected = axis ? x.size(*axis) : 1;
  STD_TORCH_CHECK(scale.numel() == expected && zero_point.numel() == expected, "expected ",
                  expected, " scales and zero points, got ", scale.numel(), " and ",
                  zero_point.numel());
  check_same_device(x, {scale, zero_point});
  return {scale.const_data_ptr<float>(),
          zero_point.const_data_ptr<float>(),
          scale.stride(0),
          zero_point.stride(0),
          quant_min,
          quant_max};
}

inline void check_gradient(const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.sizes() == x.sizes(),
                  "the gradient's dtype and shape must be those of x");
  check_same_device(x, {grad});
}

}  // namespace dfq

// The op requantize on CUDA tensors.
#include "requantize.h"

#include "tensors.h"

namespace dfq {
namespace {

Tensor requantize_cuda(const Tensor& codes, double scale, double new_scale, int64_t zero,
                       int64_t new_zero, int64_t low, int64_t high) {
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char, "codes must be int8");
  const Tensor y = torch::stable::empty_like(codes);  // dense, and codes lie as it does
  const Requantizer grids{static_cast<float>(scale),  1.0f / static_cast<float>(new_scale),
                          static_cast<int32_t>(zero), static_cast<int32_t>(new_zero),
                          static_cast<int32_t>(low),  static_cast<int32_t>(high)};
  if (codes.numel() > 0) {
    const Stream stream(codes);
    check(requantize(grids, static_cast<const int8_t*>(codes.const_data_ptr()),
                     static_cast<int8_t*>(y.mutable_data_ptr()), codes.numel(), stream));
  }
  return y;
}

}  // namespace

DFQ_CUDA_OPS(m) { m.impl("requantize", TORCH_BOX(&requantize_cuda)); }

}  // namespace dfq

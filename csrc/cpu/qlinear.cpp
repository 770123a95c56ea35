// qlinear on the CPU: a convolution of images of one column. The specification is
// dfq_kernels/qlinear.py; outputs are equal to it, bit for bit.
#include <vector>

#include "integer_layer.h"

namespace dfq {
namespace {

Tensor qlinear_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& weight_zero,
                   const OptionalTensor& prepacked, int64_t x_zero, const Tensor& multiplier,
                   const OptionalTensor& bias, const OptionalTensor& residual,
                   double residual_multiplier, int64_t residual_zero, bool relu,
                   const std::vector<int64_t>& grid) {
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous() && x.scalar_type() == ScalarType::Char,
                  "x must be contiguous int8");
  const int64_t in = x.size(x.dim() - 1), out = multiplier.numel();
  STD_TORCH_CHECK(in > 0 && out > 0, "x and the weights must have features");
  const int64_t rows = x.numel() / in;
  const Convolution shape{1,      {rows, 1}, in,     {out, 1, 1, in, 1, 1},       {1, 1},
                          {1, 1}, {0, 0},    {1, 1}, static_cast<int32_t>(x_zero)};
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out;
  if (residual) {
    STD_TORCH_CHECK(residual->is_contiguous() && residual->numel() == rows * out &&
                        residual->scalar_type() == ScalarType::Char,
                    "the residual must be contiguous int8 in the shape of the output");
  }
  const Tensor y = torch::stable::empty(sizes, output_type(grid), std::nullopt, x.device());
  const ReadyWeights weights(shape.filter, weight, prepacked);
  const Epilogue epilogue{multiplier,    bias, residual, residual_multiplier,
                          residual_zero, relu, grid};
  run_layer(shape, x, weights, weight_zero, epilogue, y);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dfq_C, m) {
  m.def(
      "qlinear(Tensor x, Tensor weight, Tensor? weight_zero, Tensor? prepacked, int x_zero, "
      "Tensor multiplier, Tensor? bias, Tensor? residual, float residual_multiplier, "
      "int residual_zero, bool relu, int[] grid) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dfq_C, CPU, m) { m.impl("qlinear", TORCH_BOX(&qlinear_cpu)); }

}  // namespace dfq

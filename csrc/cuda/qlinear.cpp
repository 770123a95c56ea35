// qlinear on CUDA tensors: a convolution of images of one pixel. The specification is
// dfq_kernels/qlinear.py.
#include "integer_layer.h"

namespace dfq {
namespace {

Tensor qlinear_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& weight_zero,
                    const OptionalTensor&, int64_t x_zero, const Tensor& multiplier,
                    const OptionalTensor& bias, const OptionalTensor& residual,
                    double residual_multiplier, int64_t residual_zero, bool relu,
                    const Sizes& grid) {
  STD_TORCH_CHECK(x.dim() > 0 && x.is_contiguous(), "x must be contiguous and have features");
  const int64_t columns = x.size(x.dim() - 1), out = multiplier.numel();
  STD_TORCH_CHECK(columns > 0 && out > 0, "x and the weights must have features");
  const int64_t in = columns * (is_packed(x) ? 2 : 1), rows = x.numel() / columns;
  check_codes(x, in, 1, "x");
  check_same_device(x, {weight, weight_zero, multiplier, bias, residual});
  if (residual) {
    check_codes(*residual, out, 1, "the residual");
    STD_TORCH_CHECK(residual->is_contiguous() &&
                        residual->numel() == rows * (is_packed(*residual) ? out / 2 : out),
                    "the residual must be contiguous in the shape of the output");
  }
  Sizes sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = is_packed(grid) ? out / 2 : out;
  const Tensor y = torch::stable::empty(sizes, output_type(grid, out, 1), std::nullopt, x.device());
  const auto bytes = static_cast<int32_t>(columns);
  const Windows windows{1,         1, 1, 1, 1, {1, 1}, {0, 0}, {1, 1}, bytes, bytes, Divider(bytes),
                        Divider(1)};
  const IntegerEpilogue epilogue{multiplier,    bias, residual, residual_multiplier,
                                 residual_zero, relu, grid};
  const IntegerOutput output = output_of(epilogue, y, rows, out, out);
  run(layer_of(windows, in, 1, x, x_zero, weight, weight_zero, output), x);
  return y;
}

}  // namespace

DFQ_CUDA_OPS(m) { m.impl("qlinear", TORCH_BOX(&qlinear_cuda)); }

}  // namespace dfq

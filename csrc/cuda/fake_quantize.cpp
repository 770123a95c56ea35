// The ops fake_quantize and fake_quantize_backward on CUDA tensors.
#include "fake_quantize.h"

#include "fake_quantize_call.h"
#include "tensors.h"

namespace dfq {
namespace {

Drop drop_of(const Tensor& x, double drop, const OptionalTensor& seed) {
  if (!seed) {
    return {nullptr, 0};
  }
  check_same_device(x, {seed});
  return {seed->const_data_ptr<int64_t>(), drop_threshold(drop)};
}

}  // namespace

Tensor fake_quantize_cuda(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                          int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                          double drop, OptionalTensor seed) {
  const auto quantizer = quantizer_of(x, scale, zero_point, quant_min, quant_max, axis);
  const Tensor y = torch::stable::empty_like(x);
  if (x.numel() > 0) {
    const Stream stream(x);
    check(fake_quantize(layout_of(y, x, x, axis), quantizer, drop_of(x, drop, seed),
                        y.mutable_data_ptr(), stream));
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward_cuda(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis, double drop,
    OptionalTensor seed, bool needs_x, bool needs_scale, bool needs_zero_point) {
  const auto quantizer = quantizer_of(x, scale, zero_point, quant_min, quant_max, axis);
  check_gradient(grad, x);
  const Tensor dx = needs_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor dscale = empty_floats(scale, needs_scale ? scale.numel() : 0);
  Tensor dzero_point = empty_floats(scale, needs_zero_point ? scale.numel() : 0);
  if (x.numel() == 0) {
    torch::stable::zero_(dscale);
    torch::stable::zero_(dzero_point);
    return {dx, dscale, dzero_point};
  }
  const bool sums = needs_scale || needs_zero_point;
  if (!needs_x && !sums) {
    return {dx, dscale, dzero_point};
  }
  const Stream stream(x);
  const Layout layout = layout_of(needs_x ? dx : as_output(x), x, grad, axis);
  const Partials partials(x, sums ? sums_of(layout.blocks) : 0);
  const QuantizerGradients gradients{needs_scale ? floats_of(dscale) : nullptr,
                                     needs_zero_point ? floats_of(dzero_point) : nullptr,
                                     sums ? partials.get() : nullptr};
  check(fake_quantize_backward(layout, quantizer, drop_of(x, drop, seed),
                               needs_x ? dx.mutable_data_ptr() : nullptr, gradients, stream));
  return {dx, dscale, dzero_point};
}

DFQ_CUDA_OPS(m) {
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize_cuda));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward_cuda));
}

}  // namespace dfq

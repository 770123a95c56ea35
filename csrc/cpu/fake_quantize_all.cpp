// fake_quantize of many tensors in one call: a model's weights are small, and the way into an op
// costs more than its work on one of them.
#include <vector>

#include "common.h"
#include "fake_quantize.h"

namespace dfq {
namespace {

// Rows of a scale each, or one scale for all.
std::optional<int64_t> axis_of(const Tensor& scale) {
  return scale.numel() == 1 ? std::nullopt : std::optional<int64_t>(0);
}

std::vector<Tensor> fake_quantize_all_cpu(std::vector<Tensor> xs, std::vector<Tensor> scales,
                                          std::vector<Tensor> zero_points,
                                          std::vector<int64_t> quant_mins,
                                          std::vector<int64_t> quant_maxs) {
  std::vector<Tensor> ys;
  ys.reserve(xs.size());
  for (size_t i = 0; i < xs.size(); ++i) {
    ys.push_back(fake_quantize_cpu(xs[i], scales[i], zero_points[i], quant_mins[i], quant_maxs[i],
                                   axis_of(scales[i]), 0.0, std::nullopt));
  }
  return ys;
}

// All gradients of xs, then all of scales, then all of zero_points.
std::vector<Tensor> fake_quantize_all_backward_cpu(
    std::vector<Tensor> grads, std::vector<Tensor> xs, std::vector<Tensor> scales,
    std::vector<Tensor> zero_points, std::vector<int64_t> quant_mins,
    std::vector<int64_t> quant_maxs, bool needs_x, bool needs_scale, bool needs_zero_point) {
  std::vector<Tensor> dxs, dscales, dzero_points;
  for (size_t i = 0; i < xs.size(); ++i) {
    auto [dx, dscale, dzero_point] = fake_quantize_backward_cpu(
        grads[i], xs[i], scales[i], zero_points[i], quant_mins[i], quant_maxs[i],
        axis_of(scales[i]), 0.0, std::nullopt, needs_x, needs_scale, needs_zero_point);
    dxs.push_back(dx);
    dscales.push_back(dscale);
    dzero_points.push_back(dzero_point);
  }
  dxs.insert(dxs.end(), dscales.begin(), dscales.end());
  dxs.insert(dxs.end(), dzero_points.begin(), dzero_points.end());
  return dxs;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dfq_C, m) {
  m.def(
      "fake_quantize_all(Tensor[] xs, Tensor[] scales, Tensor[] zero_points, int[] quant_mins, "
      "int[] quant_maxs) -> Tensor[]");
  m.def(
      "fake_quantize_all_backward(Tensor[] grads, Tensor[] xs, Tensor[] scales, "
      "Tensor[] zero_points, int[] quant_mins, int[] quant_maxs, bool needs_x, bool needs_scale, "
      "bool needs_zero_point) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(dfq_C, CPU, m) {
  m.impl("fake_quantize_all", TORCH_BOX(&fake_quantize_all_cpu));
  m.impl("fake_quantize_all_backward", TORCH_BOX(&fake_quantize_all_backward_cpu));
}

}  // namespace dfq

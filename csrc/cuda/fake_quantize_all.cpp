// The ops fake_quantize_all and fake_quantize_all_backward on CUDA tensors.
#include "fake_quantize_all.h"

#include <vector>

#include "fake_quantize_call.h"
#include "tensors.h"

namespace dfq {
namespace {

// Rows of a scale each, or one scale for all.
std::optional<int64_t> axis_of(const Tensor& scale) {
  return scale.numel() == 1 ? std::nullopt : std::optional<int64_t>(0);
}

// The lists of both ops, and the work that they come to.
struct Call {
  const std::vector<Tensor>&xs, &scales, &zero_points;
  const std::vector<int64_t>&quant_mins, &quant_maxs;

  void check(const std::vector<Tensor>& grads) const {
    const size_t n = xs.size();
    STD_TORCH_CHECK(grads.size() == n && scales.size() == n && zero_points.size() == n &&
                        quant_mins.size() == n && quant_maxs.size() == n,
                    "expected as many of everything as there are xs");
    for (const Tensor& x : xs) {
      check_same_device(xs[0], {x});
    }
  }
  FakeQuantizeJob job(size_t i, const Tensor& output, const Tensor& grad) const {
    const auto axis = axis_of(scales[i]);
    return {layout_of(output, xs[i], grad, axis),
            quantizer_of(xs[i], scales[i], zero_points[i], quant_mins[i], quant_maxs[i], axis),
            nullptr,
            {}};
  }
};

std::vector<Tensor> fake_quantize_all_cuda(std::vector<Tensor> xs, std::vector<Tensor> scales,
                                           std::vector<Tensor> zero_points,
                                           std::vector<int64_t> quant_mins,
                                           std::vector<int64_t> quant_maxs) {
  const Call call{xs, scales, zero_points, quant_mins, quant_maxs};
  call.check(xs);
  std::vector<Tensor> ys;
  std::vector<FakeQuantizeJob> jobs;
  for (size_t i = 0; i < xs.size(); ++i) {
    ys.push_back(torch::stable::empty_like(xs[i]));
    FakeQuantizeJob job = xs[i].numel() > 0 ? call.job(i, ys[i], xs[i]) : FakeQuantizeJob{};
    job.out = ys[i].mutable_data_ptr();
    if (job.layout.dense) {
      jobs.push_back(job);
    } else {
      ys[i] = fake_quantize_cuda(xs[i], scales[i], zero_points[i], quant_mins[i], quant_maxs[i],
                                 axis_of(scales[i]), 0.0, std::nullopt);
    }
  }
  if (!jobs.empty()) {
    check(fake_quantize_all(jobs, Stream(xs[0])));
  }
  return ys;
}

struct Needs {
  bool x, scale, zero_point;
};

// The gradients of one kind, of each tensor.
struct Gradients {
  std::vector<Tensor> x, scale, zero_point;

  Gradients(const Call& call, Needs needs) {
    for (size_t i = 0; i < call.xs.size(); ++i) {
      const Tensor &of = call.xs[i], &like = call.scales[i];
      x.push_back(needs.x ? torch::stable::empty_like(of) : torch::stable::new_empty(of, {0}));
      scale.push_back(empty_floats(like, needs.scale ? like.numel() : 0));
      zero_point.push_back(empty_floats(like, needs.zero_point ? like.numel() : 0));
    }
  }
  std::vector<Tensor> all() const {
    std::vector<Tensor> list = x;
    list.insert(list.end(), scale.begin(), scale.end());
    list.insert(list.end(), zero_point.begin(), zero_point.end());
    return list;
  }
};

std::vector<Tensor> fake_quantize_all_backward_cuda(
    std::vector<Tensor> grads, std::vector<Tensor> xs, std::vector<Tensor> scales,
    std::vector<Tensor> zero_points, std::vector<int64_t> quant_mins,
    std::vector<int64_t> quant_maxs, bool needs_x, bool needs_scale, bool needs_zero_point) {
  const Call call{xs, scales, zero_points, quant_mins, quant_maxs};
  call.check(grads);
  Gradients out(call, {needs_x, needs_scale, needs_zero_point});
  const bool sums = needs_scale || needs_zero_point;
  if (xs.empty() || (!needs_x && !sums)) {
    return out.all();
  }
  std::vector<FakeQuantizeJob> jobs;
  std::vector<int64_t> room_before{0};  // of each job, in sums
  for (size_t i = 0; i < xs.size(); ++i) {
    check_gradient(grads[i], xs[i]);
    FakeQuantizeJob job = xs[i].numel() > 0
                              ? call.job(i, needs_x ? out.x[i] : as_output(xs[i]), grads[i])
                              : FakeQuantizeJob{};
    if (!job.layout.dense) {
      std::tie(out.x[i], out.scale[i], out.zero_point[i]) = fake_quantize_backward_cuda(
          grads[i], xs[i], scales[i], zero_points[i], quant_mins[i], quant_maxs[i],
          axis_of(scales[i]), 0.0, std::nullopt, needs_x, needs_scale, needs_zero_point);
      continue;
    }
    job.out = needs_x ? out.x[i].mutable_data_ptr() : nullptr;
    job.gradients.scale = needs_scale ? floats_of(out.scale[i]) : nullptr;
    job.gradients.zero_point = needs_zero_point ? floats_of(out.zero_point[i]) : nullptr;
    jobs.push_back(job);
    room_before.push_back(room_before.back() + (sums ? sums_of(job.layout.blocks) : 0));
  }
  if (!jobs.empty()) {
    const Partials partials(xs[0], room_before.back());
    for (size_t i = 0; i < jobs.size(); ++i) {
      jobs[i].gradients.partials = sums ? partials.get() + room_before[i] : nullptr;
    }
    check(fake_quantize_all_backward(jobs, Stream(xs[0])));
  }
  return out.all();
}

}  // namespace

DFQ_CUDA_OPS(m) {
  m.impl("fake_quantize_all", TORCH_BOX(&fake_quantize_all_cuda));
  m.impl("fake_quantize_all_backward", TORCH_BOX(&fake_quantize_all_backward_cuda));
}

}  // namespace dfq

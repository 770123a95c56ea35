// BatchNorm in eval mode (+ ReLU) and the batch statistics of its input, in one read of x.
//
// Threads take tiles; what tiles sum is merged in float64 and in a fixed order, so the bits do not
// depend on the number of threads.
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "batch_norm_tiles.h"
#include "common.h"
#include "tiles.h"

namespace dfq {
namespace {

using OptionalTensor = std::optional<Tensor>;

// run<Kernel<T, kFlag>> on all tiles, shared out among threads.
template <template <class, bool> class Kernel, bool kFlag, class Job>
void run_tiles(const Job& job, ScalarType dtype) {
  constexpr int64_t kWorthAThread = 1 << 15;  // elements
  const Tiling& tiling = job.tiling;
  if (tiling.tiles() == 0) {
    return;
  }
  const int64_t tile = ceil_div(tiling.count() * tiling.channels(), tiling.tiles());
  with_storage(dtype, [&](auto* storage) {
    using T = std::remove_pointer_t<decltype(storage)>;
    torch::stable::parallel_for(
        0, tiling.tiles(), ceil_div(kWorthAThread, tile),
        [&](int64_t begin, int64_t end) { run<Kernel<T, kFlag>>(&job, begin, end); });
  });
}

Tensor empty_channels(const Tensor& like, int64_t channels) {
  return torch::stable::new_empty(like, {channels}, ScalarType::Float);
}

// The values of [C], or all the same one.
PerChannel per_channel(const OptionalTensor& values, int64_t channels, float otherwise) {
  PerChannel result(channels, otherwise);
  if (values) {
    STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == channels &&
                        values->scalar_type() == ScalarType::Float,
                    "expected one float32 value for each of ", channels, " channels");
    const float* from = data<float>(*values);
    const int64_t stride = values->stride(0);
    for (int64_t c = 0; c < channels; ++c) {
      result[c] = from[c * stride];
    }
  }
  return result;
}

// In float64, rounded where it is used: float32 square roots are not the same everywhere.
std::vector<double> inverse_std(const Tensor& running_var, int64_t channels, double eps) {
  const PerChannel var = per_channel(running_var, channels, 1);
  std::vector<double> result(channels);
  for (int64_t c = 0; c < channels; ++c) {
    result[c] = 1.0 / std::sqrt(var[c] + eps);
  }
  return result;
}

Affine affine(const Tensor& running_mean, const std::vector<double>& inverse,
              const OptionalTensor& weight, const OptionalTensor& bias) {
  const int64_t channels = inverse.size();
  Affine result{per_channel(running_mean, channels, 0), per_channel(weight, channels, 1),
                per_channel(bias, channels, 0)};
  for (int64_t c = 0; c < channels; ++c) {
    result.scale[c] *= static_cast<float>(inverse[c]);
  }
  return result;
}

OfStatistics of_statistics(const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
                           const Tensor& mean, const Tiling& tiling) {
  const int64_t channels = tiling.channels();
  const float count = static_cast<float>(tiling.count());
  OfStatistics result{per_channel(mean, channels, 0), per_channel(grad_mean, channels, 0),
                      per_channel(grad_var, channels, 0)};
  for (int64_t c = 0; c < channels; ++c) {
    result.offset[c] /= count;
    result.slope[c] = 2 * result.slope[c] / count;
  }
  return result;
}

void check_like(const Tensor& x, const Tensor& other) {
  bool alike = x.dim() == other.dim() && x.scalar_type() == other.scalar_type();
  for (int64_t d = 0; alike && d < x.dim(); ++d) {
    alike = x.size(d) == other.size(d);
  }
  STD_TORCH_CHECK(alike, "expected grad_y in shape and dtype as x");
}

// Statistics of all tiles, as deviations from the first.
std::tuple<Tensor, Tensor> merge_statistics(const Tiling& tiling, const Partials& partials,
                                            const Tensor& x) {
  const int64_t channels = tiling.channels();
  std::vector<double> first(channels, NAN), sum(channels), squares(channels);
  for (int64_t group = 0; group < tiling.groups(); ++group) {
    const double count = static_cast<double>(tiling.count(group));
    const double* mean = partials.at(group, 0);
    const double* within = partials.at(group, 1);
    if (group == 0) {
      std::copy(mean, mean + channels, first.begin());
    }
    for (int64_t c = 0; c < channels; ++c) {
      const double d = mean[c] - first[c];
      sum[c] += count * d;
      squares[c] += within[c] + count * d * d;
    }
  }
  Tensor mean = empty_channels(x, channels), var = empty_channels(x, channels);
  float* means = mutable_data<float>(mean);
  float* variances = mutable_data<float>(var);
  for (int64_t c = 0; c < channels; ++c) {
    const double d = sum[c] / tiling.count();
    const double variance = squares[c] / tiling.count() - d * d;
    means[c] = static_cast<float>(first[c] + d);
    variances[c] = static_cast<float>(variance < 0 ? 0 : variance);  // NaN stays
  }
  return {mean, var};
}

std::tuple<Tensor, Tensor> merge_gradients(const Tiling& tiling, const Partials& partials,
                                           const std::vector<double>& inverse, const Tensor& x) {
  const int64_t channels = tiling.channels();
  Tensor grad_weight = empty_channels(x, channels), grad_bias = empty_channels(x, channels);
  float* of_weight = mutable_data<float>(grad_weight);
  float* of_bias = mutable_data<float>(grad_bias);
  for (int64_t c = 0; c < channels; ++c) {
    double weighted = 0, plain = 0;
    for (int64_t group = 0; group < tiling.groups(); ++group) {
      weighted += partials.at(group, 0)[c];
      plain += partials.at(group, 1)[c];
    }
    of_weight[c] = static_cast<float>(weighted * inverse[c]);
    of_bias[c] = static_cast<float>(plain);
  }
  return {grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const Tensor& running_mean,
                                              const Tensor& running_var,
                                              const OptionalTensor& weight,
                                              const OptionalTensor& bias, double eps, bool relu) {
  Tensor y = torch::stable::empty_like(x);
  const Tiling tiling({x, y});
  const std::vector<double> inverse = inverse_std(running_var, tiling.channels(), eps);
  const Affine values = affine(running_mean, inverse, weight, bias);
  const Partials partials(tiling);
  const Forward job{tiling, x.const_data_ptr(), y.mutable_data_ptr(), &values, relu, partials};
  run_tiles<ForwardTiles, true>(job, x.scalar_type());
  const auto [mean, var] = merge_statistics(tiling, partials, x);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor> batch_norm_statistics(const Tensor& x, const Tensor&) {
  const Tiling tiling({x});
  const Partials partials(tiling);
  const Forward job{tiling, x.const_data_ptr(), nullptr, nullptr, false, partials};
  run_tiles<ForwardTiles, false>(job, x.scalar_type());
  return merge_statistics(tiling, partials, x);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& grad_y, const OptionalTensor& grad_mean, const OptionalTensor& grad_var,
    const Tensor& x, const Tensor& mean, const Tensor& running_mean, const Tensor& running_var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool relu, bool learns) {
  check_like(x, grad_y);
  Tensor grad_x = torch::stable::empty_like(x);
  const Tiling tiling({x, grad_x, grad_y});
  const int64_t channels = tiling.channels();
  const std::vector<double> inverse = inverse_std(running_var, channels, eps);
  const Affine values = affine(running_mean, inverse, weight, bias);
  const OfStatistics statistics = of_statistics(grad_mean, grad_var, mean, tiling);
  const bool has_statistics = grad_mean || grad_var;
  const Partials partials(tiling);
  const Backward job{tiling,
                     x.const_data_ptr(),
                     grad_x.mutable_data_ptr(),
                     grad_y.const_data_ptr(),
                     values,
                     statistics,
                     relu,
                     relu || learns || has_statistics,
                     has_statistics,
                     partials};
  if (!learns) {
    run_tiles<BackwardTiles, false>(job, x.scalar_type());
    return {grad_x, empty_channels(x, 0), empty_channels(x, 0)};
  }
  run_tiles<BackwardTiles, true>(job, x.scalar_type());
  const auto [grad_weight, grad_bias] = merge_gradients(tiling, partials, inverse, x);
  return {grad_x, grad_weight, grad_bias};
}

Tensor batch_norm_statistics_backward(const OptionalTensor& grad_mean,
                                      const OptionalTensor& grad_var, const Tensor& x,
                                      const Tensor& mean) {
  Tensor grad_x = torch::stable::empty_like(x);
  const Tiling tiling({x, grad_x});
  const PerChannel ones(tiling.channels(), 1);
  const OfStatistics statistics = of_statistics(grad_mean, grad_var, mean, tiling);
  const Affine none{ones, ones, ones};
  const Partials partials(tiling);
  const Backward job{tiling,
                     x.const_data_ptr(),
                     grad_x.mutable_data_ptr(),
                     nullptr,
                     none,
                     statistics,
                     false,
                     true,
                     true,
                     partials};
  run_tiles<BackwardTiles, false>(job, x.scalar_type());
  return grad_x;
}

STABLE_TORCH_LIBRARY_FRAGMENT(dfq_C, m) {
  m.def(
      "batch_norm(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, "
      "float eps, bool relu) -> (Tensor, Tensor, Tensor)");
  m.def("batch_norm_statistics(Tensor x, Tensor running_mean) -> (Tensor, Tensor)");
  m.def(
      "batch_norm_backward(Tensor grad_y, Tensor? grad_mean, Tensor? grad_var, Tensor x, "
      "Tensor mean, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, "
      "float eps, bool relu, bool learns) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_statistics_backward(Tensor? grad_mean, Tensor? grad_var, Tensor x, Tensor mean) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dfq_C, CPU, m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm));
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
  m.impl("batch_norm_statistics_backward", TORCH_BOX(&batch_norm_statistics_backward));
}

}  // namespace
}  // namespace dfq

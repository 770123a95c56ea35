// The ops of batch_norm on CUDA tensors.
#include "batch_norm.h"

#include <cmath>
#include <tuple>

#include "tensors.h"

namespace dfq {
namespace {

ChannelValues values_of(const OptionalTensor& values, const Tensor& x) {
  if (!values) {
    return {nullptr, 0};
  }
  STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == x.size(1) &&
                      values->scalar_type() == ScalarType::Float,
                  "expected one float32 value for each of ", x.size(1), " channels");
  check_same_device(x, {values});
  return {values->const_data_ptr<float>(), values->stride(0)};
}

int64_t count_of(const Tensor& x) { return x.size(1) == 0 ? 0 : x.numel() / x.size(1); }

// Keeps the table's memory for as long as the kernels are being launched.
struct TableRoom {
  Tensor room;

  explicit TableRoom(const Tensor& x) : room(empty_floats(x, ChannelTable::kRows * x.size(1))) {}
  ChannelTable get(const Tensor& x) const { return {floats_of(room), x.size(1)}; }
};

// Fills mean and var, and y if it is there.
void forward(const Tensor& x, const std::optional<Tensor>& y, const BatchNormArguments& arguments,
             bool relu, Tensor& mean, Tensor& var) {
  if (x.numel() == 0) {
    torch::stable::fill_(mean, NAN);
    torch::stable::fill_(var, NAN);
    return;
  }
  const Stream stream(x);
  const Layout layout = layout_of(y ? *y : as_output(x), x, x, 1);
  const TableRoom table(x);
  const Partials partials(x, sums_of(layout.blocks));
  const BatchNormForward results{y ? y->mutable_data_ptr() : nullptr,
                                 relu,
                                 floats_of(mean),
                                 floats_of(var),
                                 table.get(x),
                                 partials.get()};
  check(batch_norm(layout, arguments, results, stream));
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_cuda(const Tensor& x, const Tensor& running_mean,
                                                   const Tensor& running_var, OptionalTensor weight,
                                                   OptionalTensor bias, double eps, bool relu) {
  const Tensor y = torch::stable::empty_like(x);
  Tensor mean = empty_floats(x, x.size(1)), var = empty_floats(x, x.size(1));
  BatchNormArguments arguments{};
  arguments.running_mean = values_of(running_mean, x);
  arguments.running_var = values_of(running_var, x);
  arguments.weight = values_of(weight, x);
  arguments.bias = values_of(bias, x);
  arguments.eps = eps;
  arguments.count = count_of(x);
  forward(x, y, arguments, relu, mean, var);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor> batch_norm_statistics_cuda(const Tensor& x, const Tensor&) {
  Tensor mean = empty_floats(x, x.size(1)), var = empty_floats(x, x.size(1));
  BatchNormArguments arguments{};
  arguments.count = count_of(x);
  forward(x, std::nullopt, arguments, false, mean, var);
  return {mean, var};
}

void backward(const Tensor& x, const Tensor& dx, const OptionalTensor& grad_y,
              const BatchNormArguments& arguments, bool relu, Tensor& grad_weight,
              Tensor& grad_bias) {
  const bool learns = grad_weight.numel() > 0;
  if (x.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return;
  }
  const Stream stream(x);
  const Layout layout = layout_of(dx, x, grad_y ? *grad_y : x, 1);
  const TableRoom table(x);
  const Partials partials(x, learns ? sums_of(layout.blocks) : 0);
  BatchNormBackward results{};
  results.dx = dx.mutable_data_ptr();
  results.relu = relu;
  results.has_grad = grad_y.has_value();
  results.has_statistics = arguments.grad_mean.values || arguments.grad_var.values;
  results.grad_weight = floats_of(grad_weight);
  results.grad_bias = floats_of(grad_bias);
  results.table = table.get(x);
  results.partials = learns ? partials.get() : nullptr;
  check(batch_norm_backward(layout, arguments, results, stream));
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward_cuda(
    const Tensor& grad_y, OptionalTensor grad_mean, OptionalTensor grad_var, const Tensor& x,
    const Tensor& mean, const Tensor& running_mean, const Tensor& running_var,
    OptionalTensor weight, OptionalTensor bias, double eps, bool relu, bool learns) {
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type() && grad_y.sizes() == x.sizes(),
                  "expected grad_y in shape and dtype as x");
  check_same_device(x, {grad_y});
  const BatchNormArguments arguments{values_of(running_mean, x),
                                     values_of(running_var, x),
                                     values_of(weight, x),
                                     values_of(bias, x),
                                     values_of(mean, x),
                                     values_of(grad_mean, x),
                                     values_of(grad_var, x),
                                     eps,
                                     count_of(x)};
  const Tensor dx = torch::stable::empty_like(x);
  Tensor grad_weight = empty_floats(x, learns ? x.size(1) : 0);
  Tensor grad_bias = empty_floats(x, learns ? x.size(1) : 0);
  backward(x, dx, grad_y, arguments, relu, grad_weight, grad_bias);
  return {dx, grad_weight, grad_bias};
}

Tensor batch_norm_statistics_backward_cuda(OptionalTensor grad_mean, OptionalTensor grad_var,
                                           const Tensor& x, const Tensor& mean) {
  BatchNormArguments arguments{};
  arguments.mean = values_of(mean, x);
  arguments.grad_mean = values_of(grad_mean, x);
  arguments.grad_var = values_of(grad_var, x);
  arguments.count = count_of(x);
  const Tensor dx = torch::stable::empty_like(x);
  Tensor none = empty_floats(x, 0);
  backward(x, dx, std::nullopt, arguments, false, none, none);
  return dx;
}

}  // namespace

DFQ_CUDA_OPS(m) {
  m.impl("batch_norm", TORCH_BOX(&batch_norm_cuda));
  m.impl("batch_norm_statistics", TORCH_BOX(&batch_norm_statistics_cuda));
  m.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward_cuda));
  m.impl("batch_norm_statistics_backward", TORCH_BOX(&batch_norm_statistics_backward_cuda));
}

}  // namespace dfq

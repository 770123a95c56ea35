// The op fake_quantize and its backward on one tensor, for ops made of it.
#pragma once

#include <optional>
#include <tuple>

#include "common.h"

namespace dfq {

Tensor fake_quantize_cpu(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                         int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis,
                         double drop, std::optional<Tensor> seed);

std::tuple<Tensor, Tensor, Tensor> fake_quantize_backward_cpu(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& zero_point,
    int64_t quant_min, int64_t quant_max, std::optional<int64_t> axis, double drop,
    std::optional<Tensor> seed, bool needs_x, bool needs_scale, bool needs_zero_point);

}  // namespace dfq

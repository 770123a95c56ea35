// What qconv2d and qlinear share: their arguments, checked, and the call that runs them.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "common.h"
#include "integer_conv.h"
#include "integer_depthwise.h"
#include "packed_channels.h"

namespace dfq {

using OptionalTensor = std::optional<Tensor>;

// From sums to outputs, as the ops are given it.
struct Epilogue {
  const Tensor& multiplier;
  const OptionalTensor& bias;
  const OptionalTensor& residual;
  double residual_multiplier;
  int64_t residual_zero;
  bool relu;
  const std::vector<int64_t>& grid;  // zero, low, high of an int8 output, and 1 if it is packed
                                     // then; none: float32
};

inline void check_int8(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= -128 && value <= 127, name, " must be an int8, got ", value);
}

// [O] spread over blocks of sixteen; what no channel has is 0.
template <class To, class From>
std::vector<To> per_block(const Filter& filter, const Tensor& values) {
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == filter.out, "expected one value for each ",
                  "of ", filter.out, " channels, got ", values.numel());
  const From* from = data<From>(values);
  std::vector<To> result(filter.blocks() * kLanes);
  for (int64_t o = 0; o < filter.out; ++o) {
    const int64_t group = o / filter.group_out(), channel = o % filter.group_out();
    result[group * filter.group_blocks() * kLanes + channel] =
        static_cast<To>(from[o * values.stride(0)]);
  }
  return result;
}

// The weights as `prepacked` has them, or, without it, made so for this call.
class ReadyWeights {
 public:
  ReadyWeights(const Filter& filter, const Tensor& stored, const OptionalTensor& prepacked)
      : layout_(filter, stored.scalar_type() == ScalarType::Byte) {
    check(filter, stored);
    if (prepacked) {
      STD_TORCH_CHECK(prepacked->numel() == layout_.bytes() && prepacked->is_contiguous() &&
                          prepacked->scalar_type() == ScalarType::Char,
                      "prepacked weights have ", prepacked->numel(), " bytes instead of ",
                      layout_.bytes(), ": they are not those of this layer");
      bytes_ = data<int8_t>(*prepacked);
      return;
    }
    made_.resize(layout_.bytes());
    prepack(layout_, {stored, stored.scalar_type() == ScalarType::Byte, filter.elements()},
            made_.data());
    bytes_ = made_.data();
  }

  static void check(const Filter& filter, const Tensor& stored) {
    const bool four_bits = stored.scalar_type() == ScalarType::Byte;
    const int64_t row = four_bits ? packed_size(filter.elements()) : filter.elements();
    STD_TORCH_CHECK(four_bits || stored.scalar_type() == ScalarType::Char,
                    "weights must be int8, or uint8 with two in a byte");
    STD_TORCH_CHECK(stored.is_contiguous() && stored.numel() == filter.out * row, "expected ",
                    filter.out, " contiguous rows of ", row, " bytes of weights, got ",
                    stored.numel());
  }

  const WeightLayout& layout() const { return layout_; }
  const int8_t* bytes() const { return bytes_; }

 private:
  WeightLayout layout_;
  std::vector<int8_t> made_;
  const int8_t* bytes_;
};

// Runs the layer; x is [batch, height, width, channels] in memory, and `out` likewise.
inline void run_layer(const Convolution& shape, const Tensor& x, const ReadyWeights& weights,
                      const OptionalTensor& weight_zero, const Epilogue& epilogue,
                      const Tensor& out) {
  const Filter& filter = shape.filter;
  check_int8(shape.x_zero, "x_zero");
  check_int8(epilogue.residual_zero, "the zero of the residual");
  const auto multiplier = per_block<float, float>(filter, epilogue.multiplier);
  const auto bias = epilogue.bias ? per_block<float, float>(filter, *epilogue.bias)
                                  : std::vector<float>(multiplier.size());
  std::vector<int32_t> zeros;
  if (weight_zero) {
    zeros = per_block<int32_t, int8_t>(filter, *weight_zero);
  }
  const int32_t* sums = weights.layout().sums(weights.bytes());
  std::vector<int32_t> start(multiplier.size());
  for (size_t i = 0; i < start.size(); ++i) {
    start[i] = -(128 + shape.x_zero) * sums[i];
  }
  const bool int8 = !epilogue.grid.empty();
  const int32_t zero = int8 ? static_cast<int32_t>(epilogue.grid[0]) : 0;
  const int32_t least = int8 ? static_cast<int32_t>(epilogue.grid[1]) : 0;
  const int32_t low = epilogue.relu ? std::max(least, zero) : least;  // ReLU: not below zero
  const Output output{multiplier.data(),
                      bias.data(),
                      weight_zero ? zeros.data() : nullptr,
                      epilogue.residual ? data<int8_t>(*epilogue.residual) : nullptr,
                      static_cast<float>(epilogue.residual_multiplier),
                      static_cast<int32_t>(epilogue.residual_zero),
                      epilogue.relu ? 0.0f : -std::numeric_limits<float>::infinity(),
                      zero,
                      low,
                      int8 ? static_cast<int32_t>(epilogue.grid[2]) : 0,
                      int8 ? nullptr : mutable_data<float>(out),
                      int8 ? mutable_data<int8_t>(out) : nullptr};
  const Job job{shape, weights.layout(), data<int8_t>(x), weights.bytes(), start.data(), output};
  if (shape.pixels() > 0) {
    filter.depthwise() ? convolve_depthwise(job) : convolve(job);
  }
}

inline bool is_packed(const std::vector<int64_t>& grid) { return grid.size() == 4; }

// The output's dtype before it is packed, after a check of its grid.
inline ScalarType output_type(const std::vector<int64_t>& grid) {
  STD_TORCH_CHECK(grid.empty() || grid.size() == 3 || (is_packed(grid) && grid[3] == 1),
                  "expected zero, low and high of the output, and 1 if it is packed");
  for (const int64_t value : grid) {
    check_int8(value, "the grid of the output");
  }
  STD_TORCH_CHECK(!is_packed(grid) || (grid[1] >= -8 && grid[2] <= 7),
                  "a packed output holds -8 to 7");
  return grid.empty() ? ScalarType::Float : ScalarType::Char;
}

}  // namespace dfq

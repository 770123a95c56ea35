// What the ops qlinear and qconv2d share on CUDA tensors: their arguments, checked, as a layer.
#pragma once

#include <vector>

#include "core/nibbles.h"
#include "integer_gemm.h"
#include "tensors.h"

namespace dfq {

using Sizes = std::vector<int64_t>;

constexpr int64_t kMostProducts = 65793;  // of a sum: of more, int32 might not hold it

// From sums to outputs, as the ops are given it.
struct IntegerEpilogue {
  const Tensor& multiplier;
  const OptionalTensor& bias;
  const OptionalTensor& residual;
  double residual_multiplier;
  int64_t residual_zero;
  bool relu;
  const Sizes& grid;  // zero, low, high of integers, and 1 if they are packed; none: float32
};

inline bool is_packed(const Tensor& codes) { return codes.scalar_type() == ScalarType::Byte; }
inline bool is_packed(const Sizes& grid) { return grid.size() == 4; }
inline const uint8_t* bytes_of(const Tensor& tensor) {
  return static_cast<const uint8_t*>(tensor.const_data_ptr());
}
inline bool aligned(const void* pointer, int64_t to) {
  return reinterpret_cast<uintptr_t>(pointer) % to == 0;
}

// Whether codes of this many channels, the fastest dimension, are int8 or packed.
inline void check_codes(const Tensor& codes, int64_t channels, int64_t groups, const char* name) {
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char || is_packed(codes), name,
                  " must be int8, or uint8 with two integers in a byte");
  STD_TORCH_CHECK(!is_packed(codes) || (channels % kPackBlock == 0 && groups == 1), name,
                  " may be packed only with a multiple of 64 channels and one group");
}

inline int32_t stored_integer(int64_t value, bool packed, const char* name) {
  const int64_t half = packed ? 8 : 128;
  STD_TORCH_CHECK(value >= -half && value < half, name, " must be ", -half, " to ", half - 1,
                  ", got ", value);
  return static_cast<int32_t>(value);
}

template <class T>
PerChannel<T> per_channel(const OptionalTensor& values, ScalarType type, int64_t channels) {
  if (!values) {
    return {nullptr, 0};
  }
  STD_TORCH_CHECK(
      values->dim() == 1 && values->size(0) == channels && values->scalar_type() == type,
      "expected one value for each of ", channels, " channels, got ", values->numel());
  return {static_cast<const T*>(values->const_data_ptr()), values->stride(0)};
}

// The output's dtype, after a check of its grid.
inline ScalarType output_type(const Sizes& grid, int64_t channels, int64_t groups) {
  if (grid.empty()) {
    return ScalarType::Float;
  }
  const bool packed = is_packed(grid);
  STD_TORCH_CHECK(grid.size() == 3 || (packed && grid[3] == 1),
                  "expected zero, low and high of the output, and 1 if it is packed");
  STD_TORCH_CHECK(!packed || (channels % kPackBlock == 0 && groups == 1),
                  "a packed output has a multiple of 64 channels and one group");
  for (int i = 0; i < 3; ++i) {
    stored_integer(grid[i], packed, "the grid of the output");
  }
  return packed ? ScalarType::Byte : ScalarType::Char;
}

inline IntegerOutput output_of(const IntegerEpilogue& epilogue, const Tensor& y, int64_t rows,
                               int64_t channels, int64_t group_channels) {
  const Sizes& grid = epilogue.grid;
  IntegerOutput out{};
  out.kind = grid.empty()      ? OutputKind::kFloat
             : is_packed(grid) ? OutputKind::kPacked
                               : OutputKind::kInt8;
  out.y = y.mutable_data_ptr();
  out.rows = rows;
  out.channels = channels;
  out.multiplier = per_channel<float>(epilogue.multiplier, ScalarType::Float, channels);
  out.bias = per_channel<float>(epilogue.bias, ScalarType::Float, channels);
  if (epilogue.residual) {
    out.residual = epilogue.residual->const_data_ptr();
    out.residual_packed = is_packed(*epilogue.residual);
    out.residual_multiplier = static_cast<float>(epilogue.residual_multiplier);
    out.residual_zero =
        stored_integer(epilogue.residual_zero, out.residual_packed, "the zero of the residual");
  }
  out.relu = epilogue.relu;
  if (!grid.empty()) {
    out.zero = static_cast<int32_t>(grid[0]);
    out.low = static_cast<int32_t>(grid[1]);
    out.high = static_cast<int32_t>(grid[2]);
  }
  out.fours = group_channels % 4 == 0 && aligned(out.residual, 4);
  return out;
}

// For windows of `k` taps and channels together, in x.
inline IntegerLayer layer_of(const Windows& windows, int64_t k, int64_t groups, const Tensor& x,
                             int64_t x_zero, const Tensor& weight,
                             const OptionalTensor& weight_zero, const IntegerOutput& output) {
  STD_TORCH_CHECK(k > 0 && k <= kMostProducts, "sums of ", k, " products may leave int32");
  IntegerLayer layer{};
  layer.windows = windows;
  layer.x = bytes_of(x);
  layer.x_packed = is_packed(x);
  layer.x_zero = stored_integer(x_zero, layer.x_packed, "x_zero");
  layer.row_bytes = static_cast<int32_t>(layer.x_packed ? k / 2 : k);
  layer.weight = bytes_of(weight);
  layer.weight_packed = is_packed(weight);
  layer.weight_row_bytes = static_cast<int32_t>(layer.weight_packed ? packed_size(k) : k);
  layer.k = static_cast<int32_t>(k);
  layer.groups = static_cast<int32_t>(groups);
  layer.group_channels = static_cast<int32_t>(output.channels / groups);
  STD_TORCH_CHECK(layer.weight_packed || weight.scalar_type() == ScalarType::Char,
                  "weights must be int8, or uint8 with two in a byte");
  STD_TORCH_CHECK(
      weight.is_contiguous() && weight.numel() == output.channels * layer.weight_row_bytes,
      "expected ", output.channels, " contiguous rows of ", layer.weight_row_bytes,
      " bytes of weights, got ", weight.numel());
  layer.weight_zero = per_channel<int8_t>(weight_zero, ScalarType::Char, output.channels);
  layer.vectors = windows.tap_bytes % 16 == 0 && layer.weight_row_bytes % 16 == 0 &&
                  aligned(layer.x, 16) && aligned(layer.weight, 16);
  layer.output = output;
  return layer;
}

inline void run(const IntegerLayer& layer, const Tensor& x,
                Failure (*kernels)(const IntegerLayer&, void*) = &integer_gemm) {
  if (layer.output.rows > 0) {
    const Stream stream(x);
    check(kernels(layer, stream));
  }
}

}  // namespace dfq

// qlinear on the CPU: a convolution of images of one column. The specification is
// dfq_kernels/qlinear.py; outputs are equal to it, bit for bit.
#include <vector>

#include "integer_layer.h"

namespace dfq {
namespace {

using Sizes = std::vector<int64_t>;

// Codes of `rows` rows, int8; packed, they have whole blocks in each row.
Tensor as_bytes(const Tensor& codes, int64_t rows, int64_t columns, const char* name) {
  const int64_t expected = rows * columns / (is_packed(codes) ? 2 : 1);
  STD_TORCH_CHECK((codes.scalar_type() == ScalarType::Char ||
                   (is_packed(codes) && columns % kPackBlock == 0)) &&
                      codes.is_contiguous() && codes.numel() == expected,
                  name, " must be ", rows, " contiguous rows of ", columns,
                  " int8, or packed with a multiple of 64");
  return is_packed(codes) ? unpack_channels(codes, {rows, columns}, MemoryFormat::Contiguous)
                          : codes;
}

Tensor qlinear_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& weight_zero,
                   const OptionalTensor& prepacked, int64_t x_zero, const Tensor& multiplier,
                   const OptionalTensor& bias, const OptionalTensor& residual,
                   double residual_multiplier, int64_t residual_zero, bool relu,
                   const std::vector<int64_t>& grid) {
  STD_TORCH_CHECK(input.dim() > 0, "x must have features");
  const int64_t columns = input.size(input.dim() - 1), out = multiplier.numel();
  STD_TORCH_CHECK(columns > 0 && out > 0, "x and the weights must have features");
  const int64_t in = columns * (is_packed(input) ? 2 : 1), rows = input.numel() / columns;
  const Tensor x = as_bytes(input, rows, in, "x");
  const Convolution shape{1,      {rows, 1}, in,     {out, 1, 1, in, 1, 1},       {1, 1},
                          {1, 1}, {0, 0},    {1, 1}, static_cast<int32_t>(x_zero)};
  Sizes sizes(input.sizes().begin(), input.sizes().end());
  sizes.back() = out;
  const OptionalTensor added =
      residual ? OptionalTensor(as_bytes(*residual, rows, out, "the residual")) : std::nullopt;
  const Tensor y = torch::stable::empty(sizes, output_type(grid), std::nullopt, x.device());
  const ReadyWeights weights(shape.filter, weight, prepacked);
  const Epilogue epilogue{multiplier, bias, added, residual_multiplier, residual_zero, relu, grid};
  run_layer(shape, x, weights, weight_zero, epilogue, y);
  if (!is_packed(grid)) {
    return y;
  }
  STD_TORCH_CHECK(out % kPackBlock == 0, "a packed output has a multiple of 64 channels");
  sizes.back() = out / 2;
  return pack_channels(y, sizes, MemoryFormat::Contiguous);
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

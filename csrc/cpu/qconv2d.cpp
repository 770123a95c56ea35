// qconv2d on the CPU, and the weights it reads. The specification is dfq_kernels/qconv2d.py;
// outputs are equal to it, bit for bit.
#include <optional>
#include <vector>

#include "integer_layer.h"

namespace dfq {
namespace {

using Sizes = std::vector<int64_t>;

// [B, C, H, W] in channels_last memory.
void check_images(const Tensor& images, const Sizes& sizes, const char* name) {
  STD_TORCH_CHECK(
      (images.scalar_type() == ScalarType::Char || is_packed(images)) && images.dim() == 4, name,
      " must be int8 [B, C, H, W], or packed");
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(images.size(d) == sizes[d], name, " has size ", images.size(d),
                    " in dimension ", d, " instead of ", sizes[d]);
    STD_TORCH_CHECK(images.size(d) == 1 || images.stride(d) == expected || images.numel() == 0,
                    name, " must lie in channels_last memory");
    expected *= images.size(d);
  }
}

// `sizes` of codes as they are packed.
Sizes packed_sizes(Sizes sizes) {
  STD_TORCH_CHECK(sizes[1] % kPackBlock == 0, "packed activations have a multiple of 64 channels");
  sizes[1] /= 2;
  return sizes;
}

// Images that were checked, of `sizes`, and int8.
Tensor as_bytes(const Tensor& images, const Sizes& sizes, const char* name) {
  check_images(images, is_packed(images) ? packed_sizes(sizes) : sizes, name);
  return is_packed(images) ? unpack_channels(images, sizes, MemoryFormat::ChannelsLast) : images;
}

Filter filter_of(int64_t out, const Sizes& kernel, int64_t in, int64_t groups,
                 const Sizes& dilation) {
  STD_TORCH_CHECK(
      groups > 0 && in > 0 && out % groups == 0 && kernel.size() == 2 && dilation.size() == 2,
      "groups must divide the channels, and sizes be those of height and width");
  return {out, kernel[0], kernel[1], in, groups, dilation[1]};
}

Tensor qconv2d_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& weight_zero,
                   const OptionalTensor& prepacked, int64_t x_zero, const Sizes& kernel,
                   const Sizes& stride, const Sizes& padding, const Sizes& dilation, int64_t groups,
                   const Tensor& multiplier, const OptionalTensor& bias,
                   const OptionalTensor& residual, double residual_multiplier,
                   int64_t residual_zero, bool relu, const Sizes& grid) {
  STD_TORCH_CHECK(input.dim() == 4 && stride.size() == 2 && padding.size() == 2, "x must be 4-d");
  const int64_t channels = input.size(1) * (is_packed(input) ? 2 : 1);
  const Tensor x = as_bytes(input, {input.size(0), channels, input.size(2), input.size(3)}, "x");
  STD_TORCH_CHECK(groups > 0 && channels % groups == 0, "groups must divide the channels of x");
  const Convolution shape{
      x.size(0),
      {x.size(2), x.size(3)},
      channels,
      filter_of(multiplier.numel(), kernel, channels / groups, groups, dilation),
      {kernel[0], kernel[1]},
      {stride[0], stride[1]},
      {padding[0], padding[1]},
      {dilation[0], dilation[1]},
      static_cast<int32_t>(x_zero)};
  const Sizes sizes{x.size(0), shape.filter.out, shape.out_size(0), shape.out_size(1)};
  STD_TORCH_CHECK(sizes[2] > 0 && sizes[3] > 0, "the window is larger than the image");
  const OptionalTensor added =
      residual ? OptionalTensor(as_bytes(*residual, sizes, "the residual")) : std::nullopt;
  const Tensor out = torch::stable::empty(sizes, output_type(grid), std::nullopt, x.device(),
                                          std::nullopt, MemoryFormat::ChannelsLast);
  const ReadyWeights weights(shape.filter, weight, prepacked);
  const Epilogue epilogue{multiplier, bias, added, residual_multiplier, residual_zero, relu, grid};
  run_layer(shape, x, weights, weight_zero, epilogue, out);
  return is_packed(grid) ? pack_channels(out, packed_sizes(sizes), MemoryFormat::ChannelsLast)
                         : out;
}

// `shape` is [O, kh, kw, I].
Tensor prepack_weight(const Tensor& weight, const Sizes& shape, int64_t groups,
                      int64_t dilation_width) {
  STD_TORCH_CHECK(shape.size() == 4, "expected the shape [O, kh, kw, I]");
  const Filter filter =
      filter_of(shape[0], {shape[1], shape[2]}, shape[3], groups, {1, dilation_width});
  ReadyWeights::check(filter, weight);
  const bool four_bits = weight.scalar_type() == ScalarType::Byte;
  const WeightLayout layout(filter, four_bits);
  const Tensor out =
      torch::stable::empty({layout.bytes()}, ScalarType::Char, std::nullopt, weight.device());
  prepack(layout, {weight, four_bits, filter.elements()}, mutable_data<int8_t>(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dfq_C, m) {
  m.def(
      "qconv2d(Tensor x, Tensor weight, Tensor? weight_zero, Tensor? prepacked, int x_zero, "
      "int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, "
      "Tensor multiplier, Tensor? bias, Tensor? residual, float residual_multiplier, "
      "int residual_zero, bool relu, int[] grid) -> Tensor");
  m.def("prepack_weight(Tensor weight, int[] shape, int groups, int dilation_width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dfq_C, CPU, m) {
  m.impl("qconv2d", TORCH_BOX(&qconv2d_cpu));
  m.impl("prepack_weight", TORCH_BOX(&prepack_weight));
}

}  // namespace dfq

// qconv2d on CUDA tensors. The specification is dfq_kernels/qconv2d.py.
#include "depthwise.h"
#include "integer_layer.h"

namespace dfq {
namespace {

constexpr int64_t kLargest = 1 << 29;  // size or padding of an image

// [B, C, H, W] in channels_last memory; `sizes` are those of what is not packed.
void check_images(const Tensor& images, Sizes sizes, int64_t groups, const char* name) {
  check_codes(images, sizes[1], groups, name);
  sizes[1] /= is_packed(images) ? 2 : 1;
  STD_TORCH_CHECK(images.dim() == 4, name, " must be [B, C, H, W]");
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(images.size(d) == sizes[d], name, " has size ", images.size(d),
                    " in dimension ", d, " instead of ", sizes[d]);
    STD_TORCH_CHECK(images.size(d) == 1 || images.stride(d) == expected || images.numel() == 0,
                    name, " must lie in channels_last memory");
    expected *= images.size(d);
  }
}

// Pairs are along height and width.
struct Geometry {
  const Sizes &kernel, &stride, &padding, &dilation;

  void check(const Tensor& x) const {
    for (const Sizes* pair : {&kernel, &stride, &padding, &dilation}) {
      STD_TORCH_CHECK(pair->size() == 2, "expected sizes along height and width");
    }
    for (int d = 0; d < 2; ++d) {
      STD_TORCH_CHECK(kernel[d] > 0 && stride[d] > 0 && padding[d] >= 0 && dilation[d] > 0,
                      "sizes, strides and dilations must be positive, padding not negative");
      STD_TORCH_CHECK(x.size(2 + d) < kLargest && padding[d] < kLargest && out_size(x, d) > 0,
                      "the window is larger than the image, or the image too large");
    }
  }
  int64_t out_size(const Tensor& x, int d) const {
    const int64_t room = x.size(2 + d) + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
    return room < 0 ? 0 : room / stride[d] + 1;
  }
  Windows windows(const Tensor& x, int64_t groups) const {
    const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
    const int32_t pixel = narrow(x.size(1)), tap = narrow(x.size(1) / groups);
    return {narrow(x.size(2)),
            narrow(x.size(3)),
            narrow(out_size(x, 0)),
            narrow(out_size(x, 1)),
            narrow(kernel[1]),
            {narrow(stride[0]), narrow(stride[1])},
            {narrow(padding[0]), narrow(padding[1])},
            {narrow(dilation[0]), narrow(dilation[1])},
            pixel,
            tap,
            Divider(tap),
            Divider(narrow(kernel[1]))};
  }
};

Tensor qconv2d_cuda(const Tensor& x, const Tensor& weight, const OptionalTensor& weight_zero,
                    const OptionalTensor&, int64_t x_zero, const Sizes& kernel, const Sizes& stride,
                    const Sizes& padding, const Sizes& dilation, int64_t groups,
                    const Tensor& multiplier, const OptionalTensor& bias,
                    const OptionalTensor& residual, double residual_multiplier,
                    int64_t residual_zero, bool relu, const Sizes& grid) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be [B, C, H, W]");
  const int64_t channels = x.size(1) * (is_packed(x) ? 2 : 1), out = multiplier.numel();
  STD_TORCH_CHECK(
      groups > 0 && channels > 0 && channels % groups == 0 && out > 0 && out % groups == 0,
      "groups must divide the channels");
  check_images(x, {x.size(0), channels, x.size(2), x.size(3)}, groups, "x");
  check_same_device(x, {weight, weight_zero, multiplier, bias, residual});
  const Geometry geometry{kernel, stride, padding, dilation};
  geometry.check(x);
  Sizes sizes{x.size(0), out, geometry.out_size(x, 0), geometry.out_size(x, 1)};
  if (residual) {
    check_images(*residual, sizes, groups, "the residual");
  }
  const int64_t rows = sizes[0] * sizes[2] * sizes[3];
  sizes[1] = is_packed(grid) ? out / 2 : out;
  const Tensor y =
      torch::stable::empty(sizes, output_type(grid, out, groups), std::nullopt, x.device(),
                           std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast);
  const IntegerEpilogue epilogue{multiplier,    bias, residual, residual_multiplier,
                                 residual_zero, relu, grid};
  const IntegerOutput output = output_of(epilogue, y, rows, out, out / groups);
  const int64_t k = kernel[0] * kernel[1] * (channels / groups);
  const IntegerLayer layer =
      layer_of(geometry.windows(x, groups), k, groups, x, x_zero, weight, weight_zero, output);
  run(layer, x, channels > 1 && groups == channels ? &depthwise : &integer_gemm);
  return y;
}

}  // namespace

DFQ_CUDA_OPS(m) { m.impl("qconv2d", TORCH_BOX(&qconv2d_cuda)); }

}  // namespace dfq

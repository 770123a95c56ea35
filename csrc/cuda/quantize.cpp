// The op quantize on CUDA tensors.
#include "quantize.h"

#include "fake_quantize_call.h"
#include "tensors.h"

namespace dfq {
namespace {

// Whether the pixels of each plane of [B, C, H, W] are neighbours.
bool has_planes(const Tensor& x) {
  const int64_t height = x.size(2), width = x.size(3);
  return (width == 1 || x.stride(3) == 1) && (height == 1 || x.stride(2) == width);
}

Tensor quantize_cuda(const Tensor& x, const Tensor& scale, const Tensor& zero_point,
                     int64_t quant_min, int64_t quant_max, int64_t offset) {
  using torch::headeronly::MemoryFormat;
  const bool images = x.dim() == 4;
  const Tensor y =
      torch::stable::empty(x.sizes(), ScalarType::Char, std::nullopt, x.device(), std::nullopt,
                           images ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  Codes codes{};
  codes.quantizer = quantizer_of(x, scale, zero_point, quant_min, quant_max, std::nullopt);
  codes.offset = offset;
  codes.storage = storage_of(x);
  codes.x = x.const_data_ptr();
  codes.out = static_cast<int8_t*>(y.mutable_data_ptr());
  codes.count = x.numel();
  if (codes.count == 0) {
    return y;
  }
  if (lies_as(x, y)) {
    codes.order = Order::kSame;
  } else if (images && x.size(1) > 1 && has_planes(x)) {
    const int64_t lanes = codes.storage == Storage::kFloat ? 4 : 8;
    codes.order = Order::kPlanes;
    codes.batch = x.size(0);
    codes.channels = x.size(1);
    codes.pixels = x.size(2) * x.size(3);
    codes.batch_stride = x.stride(0);
    codes.channel_stride = x.stride(1);
    codes.vectors = reinterpret_cast<uintptr_t>(codes.x) % 16 == 0 &&
                    (codes.batch == 1 || codes.batch_stride % lanes == 0) &&
                    codes.channel_stride % lanes == 0;
  } else {
    codes.order = Order::kAny;
    STD_TORCH_CHECK(codes.strides.set(merged_dimensions(y, x, x, std::nullopt)),
                    "expected strides that can be merged into at most ", Strides::kMost,
                    " dimensions");
  }
  const Stream stream(x);
  check(quantize(codes, stream));
  return y;
}

}  // namespace

DFQ_CUDA_OPS(m) { m.impl("quantize", TORCH_BOX(&quantize_cuda)); }

}  // namespace dfq

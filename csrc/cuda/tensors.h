// From tensors to what the kernels take. Compiled by the C++ compiler: the kernels know no torch.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "layout.h"

// The emulation's ops are beside those of csrc/cpu, in a namespace of their own.
#if defined(DFQ_EMULATE_CUDA)
#define DFQ_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(dfq_emulated, CPU, m)
#else
#define DFQ_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(dfq_C, CUDA, m)
#endif

namespace dfq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The current stream of a tensor's device, which is the current device while this lives.
class Stream {
 public:
#if defined(DFQ_EMULATE_CUDA)
  explicit Stream(const Tensor&) {}
#else
  explicit Stream(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
  }
#endif
  operator void*() const { return stream_; }

 private:
#if !defined(DFQ_EMULATE_CUDA)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

inline void check(Failure failure) {
  STD_TORCH_CHECK(!failure, "the CUDA kernel did not run: ", failure);
}

inline void check_same_device(const Tensor& x, std::initializer_list<OptionalTensor> others) {
  for (const OptionalTensor& other : others) {
    STD_TORCH_CHECK(!other || (other->is_cuda() == x.is_cuda() &&
                               other->get_device_index() == x.get_device_index()),
                    "expected all tensors on the device of x");
  }
}

inline Storage storage_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Storage::kFloat;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kHalf;
    default:
      STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
}

// Whether vectors of an input can be loaded from where the output's are stored.
inline bool lies_as(const Tensor& input, const Tensor& output) {
  for (int64_t d = 0; d < output.dim(); ++d) {
    if (output.size(d) != 1 && input.stride(d) != output.stride(d)) {
      return false;
    }
  }
  return reinterpret_cast<uintptr_t>(input.const_data_ptr()) % 16 == 0;
}

// `output` is dense and none of its sizes 0; x and grad have its sizes, and may be the same.
inline Layout layout_of(const Tensor& output, const Tensor& x, const Tensor& grad,
                        std::optional<int64_t> axis) {
  Layout layout;
  const bool channels = axis && output.size(*axis) > 1;
  const int64_t count = channels ? output.size(*axis) : 1;
  const int64_t run = channels ? output.stride(*axis) : output.numel();
  layout.storage = storage_of(output);
  layout.dense = lies_as(x, output) && lies_as(grad, output);
  const bool wide = layout.dense && layout.storage != Storage::kFloat;
  layout.blocks = cut(output.numel() / (count * run), count, run, wide ? 8 : 4);
  layout.input[0] = x.const_data_ptr();
  layout.input[1] = grad.const_data_ptr();
  STD_TORCH_CHECK(
      layout.dense || layout.strides.set(merged_dimensions(output, x, grad, std::nullopt)),
      "expected strides that can be merged into at most ", Strides::kMost, " dimensions");
  return layout;
}

// A tensor that lies as empty_like(x): x itself if it is dense. For ops that write none.
inline Tensor as_output(const Tensor& x) {
  const auto merged = merged_dimensions(x, x, x, std::nullopt);
  const bool dense = merged.size() == 1 && merged.front().stride[0] == 1;
  return dense ? x : torch::stable::empty_like(x);
}

inline Tensor empty_floats(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Float);
}
inline float* floats_of(const Tensor& tensor) { return tensor.mutable_data_ptr<float>(); }

// Room for what the blocks sum. PyTorch's allocator keeps it until the stream is done with it.
class Partials {
 public:
  Partials(const Tensor& like, int64_t sums)
      : room_(torch::stable::new_empty(like, {2 * sums}, ScalarType::Double)) {}
  Pair<double>* get() const { return reinterpret_cast<Pair<double>*>(room_.mutable_data_ptr()); }

 private:
  Tensor room_;
};
inline int64_t sums_of(const Blocks& blocks) { return blocks.count() * blocks.most_slots(); }

}  // namespace dfq

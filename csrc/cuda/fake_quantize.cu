// fake_quantize and its backward on the GPU: one pass over memory each, any layout.
// The specification is dfq_kernels/fake_quantize.py; integers are equal to it, bit for bit.
#include "fake_quantize.h"
#include "fake_quantize_ops.h"

namespace dfq {
namespace {

__global__ void __launch_bounds__(kFinishThreads)
    finish(const FinishQuantizer gradients, const Blocks blocks, const Pair<double>* partials) {
  finish_channel(gradients, blocks, partials, blockIdx.x);
}

}  // namespace

Failure fake_quantize(const Layout& layout, const Quantizer& quantizer, const Drop& drop, void* y,
                      void* stream) {
  return launch_walk(FakeQuantize{quantizer, y, drop.seed, drop.threshold}, layout, stream);
}

Failure fake_quantize_backward(const Layout& layout, const Quantizer& quantizer, const Drop& drop,
                               void* dx, const QuantizerGradients& gradients, void* stream) {
  const FakeQuantizeBackward op{quantizer, dx, drop.seed, drop.threshold, gradients.partials};
  const Failure failure = launch_walk(op, layout, stream);
  if (failure || !gradients.needed()) {
    return failure;
  }
  const Blocks& blocks = layout.blocks;
  return launch(&finish, blocks.channels, finish_threads(blocks), stream,
                FinishQuantizer{quantizer, gradients.scale, gradients.zero_point}, blocks,
                static_cast<const Pair<double>*>(gradients.partials));
}

}  // namespace dfq

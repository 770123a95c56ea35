// BatchNorm in eval mode (+ ReLU) and the batch statistics of its input, in one read of x.
// The specification is dfq_kernels/batch_norm.py; y and dx are equal to it, bit for bit.
#include "batch_norm.h"
#include "batch_norm_ops.h"

namespace dfq {
namespace {

constexpr int kTableThreads = 128;

__global__ void __launch_bounds__(kTableThreads)
    fill_table(const ChannelTable table, const BatchNormArguments of) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kTableThreads + threadIdx.x;
  if (c >= table.channels) {
    return;
  }
  // in float64, and rounded: float32 square roots are not the same everywhere
  const double inverse = 1 / sqrt(of.running_var.at(c, 1) + of.eps);
  const float count = static_cast<float>(of.count);
  table.at(ChannelTable::kShift, c) = of.running_mean.at(c, 0);
  table.at(ChannelTable::kScale, c) = static_cast<float>(inverse) * of.weight.at(c, 1);
  table.at(ChannelTable::kBias, c) = of.bias.at(c, 0);
  table.at(ChannelTable::kMean, c) = of.mean.at(c, 0);
  table.at(ChannelTable::kOffset, c) = of.grad_mean.at(c, 0) / count;
  table.at(ChannelTable::kSlope, c) = 2 * of.grad_var.at(c, 0) / count;
}

template <class Finish>
__global__ void __launch_bounds__(kFinishThreads)
    finish(const Finish of, const Blocks blocks, const Pair<double>* partials) {
  finish_channel(of, blocks, partials, blockIdx.x);
}

Failure launch_table(const ChannelTable& table, const BatchNormArguments& arguments, void* stream) {
  const int64_t blocks = (table.channels + kTableThreads - 1) / kTableThreads;
  return launch(&fill_table, blocks, kTableThreads, stream, table, arguments);
}

template <class Finish>
Failure launch_finish(const Finish& of, const Blocks& blocks, const Pair<double>* partials,
                      void* stream) {
  return launch(&finish<Finish>, blocks.channels, finish_threads(blocks), stream, of, blocks,
                partials);
}

}  // namespace

Failure batch_norm(const Layout& layout, const BatchNormArguments& arguments,
                   const BatchNormForward& forward, void* stream) {
  Failure failure = forward.y ? launch_table(forward.table, arguments, stream) : nullptr;
  if (failure) {
    return failure;
  }
  const NormalizeElement op{forward.table, forward.y, forward.relu ? 0.0f : -INFINITY,
                            forward.partials};
  failure = launch_walk(op, layout, stream);
  if (failure) {
    return failure;
  }
  const FinishStatistics statistics{forward.mean, forward.var, arguments.count};
  return launch_finish(statistics, layout.blocks, forward.partials, stream);
}

Failure batch_norm_backward(const Layout& layout, const BatchNormArguments& arguments,
                            const BatchNormBackward& backward, void* stream) {
  Failure failure = launch_table(backward.table, arguments, stream);
  if (failure) {
    return failure;
  }
  const NormalizeElementBackward op{backward.table,          backward.dx,
                                    backward.relu,           backward.has_grad,
                                    backward.has_statistics, backward.partials};
  failure = launch_walk(op, layout, stream);
  if (failure || !backward.partials) {
    return failure;
  }
  const FinishBatchNorm gradients{arguments, backward.grad_weight, backward.grad_bias};
  return launch_finish(gradients, layout.blocks, backward.partials, stream);
}

}  // namespace dfq

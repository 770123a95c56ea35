// Kernels that a GPU would punish, or that depend on the order of threads: the emulation must tell.
#include <cstdint>

#include "launch.h"
#include "tensor_cores.h"
#include "vectors.h"

#define DFQ_EXPORT extern "C" __attribute__((visibility("default")))

namespace dfq {
namespace {

__global__ void load_from(const char* address, uint4* to) { *to = load_vector(address); }

__global__ void half_wait() {
  if (threadIdx.x < 16) {
    __syncthreads();
  }
}

__global__ void wait_here_and_there() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void half_shuffle() {
  if (threadIdx.x < 16) {
    __shfl_xor_sync(~0u, 1.0f, 1);
  }
}

__global__ void read_unwritten(float* to) {
  DFQ_SHARED(float, values, 64);
  if (threadIdx.x == 0) {
    values[0] = 1;
  }
  __syncthreads();
  to[threadIdx.x] = values[threadIdx.x];
}

// Each thread should wait until its neighbour has written.
__global__ void race(float* to) {
  DFQ_SHARED(float, values, 64);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  to[threadIdx.x] = values[63 - threadIdx.x];
}

// Each should wait for all groups.
__global__ void read_too_early(float* to) {
  DFQ_SHARED(float, values, 64);
  if (threadIdx.x < 16) {
    copy_asynchronously(reinterpret_cast<uint4*>(values) + threadIdx.x, to + 4 * threadIdx.x);
  }
  close_group();
  wait_for_groups<1>();
  __syncthreads();
  to[threadIdx.x] = values[threadIdx.x];
}

__global__ void last_writes(float* to) { *to = static_cast<float>(blockIdx.x); }

}  // namespace

DFQ_EXPORT Failure misaligned() {
  alignas(16) char memory[48] = {};
  uint4 to;
  return launch(&load_from, 1, 32, nullptr, memory + 4, &to);
}
DFQ_EXPORT Failure divergent_barrier() { return launch(&half_wait, 2, 32, nullptr); }
DFQ_EXPORT Failure two_barriers() { return launch(&wait_here_and_there, 1, 64, nullptr); }
DFQ_EXPORT Failure divergent_shuffle() { return launch(&half_shuffle, 1, 32, nullptr); }
DFQ_EXPORT Failure part_of_a_warp() { return launch(&half_wait, 1, 40, nullptr); }

// These fill 64 floats, or one.
DFQ_EXPORT Failure unwritten_shared(float* to) {
  return launch(&read_unwritten, 1, 64, nullptr, to);
}
DFQ_EXPORT Failure race_in_a_block(float* to) { return launch(&race, 1, 64, nullptr, to); }
DFQ_EXPORT Failure unawaited_copy(float* to) { return launch(&read_too_early, 1, 64, nullptr, to); }
DFQ_EXPORT Failure race_of_blocks(float* to) { return launch(&last_writes, 5, 32, nullptr, to); }

}  // namespace dfq

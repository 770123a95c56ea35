// What csrc/cuda uses of CUDA, for a CPU. Each thread of a block is a fiber that runs until it
// waits for others; blocks run one after another. What a GPU would punish is an error here.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__ static
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

#define __syncthreads() emulated::barrier(__FILE__, __LINE__)
#define __syncwarp() emulated::exchange(nullptr, 0, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, lanes) \
  emulated::shuffle_xor(mask, value, lanes, __FILE__, __LINE__)

#define DFQ_ASSERT_ALIGNED(...) emulated::assert_aligned(__VA_ARGS__)
#define DFQ_SHARED(Type, name, count)                                     \
  alignas(16) static unsigned char name##_memory[sizeof(Type) * (count)]; \
  Type* const name = static_cast<Type*>(emulated::shared(name##_memory, sizeof(name##_memory)))

struct __attribute__((may_alias, aligned(16))) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 __ldg(const uint4* from) { return *from; }

namespace emulated {

struct Index {
  unsigned x;
};

// Runs `body` as every thread of every block. What it did that a GPU would punish, or null; valid
// until the next launch.
const char* run(int64_t blocks, int threads, const std::function<void()>& body);

void barrier(const char* file, int line);
void assert_aligned(const void* pointer, size_t bytes = 16);

// A block's shared memory: filled with NaN before its first thread comes by.
void* shared(void* memory, size_t size);

// Gives `size` bytes of this thread to its warp, and returns those of all lanes, one after another;
// valid until the thread's next exchange.
const void* exchange(const void* given, size_t size, const char* file, int line);

// This thread's value, and that of the lane whose number differs in `lanes`.
uint64_t shuffle_xor_bits(unsigned mask, uint64_t bits, int lanes, const char* file, int line);

// What is copied comes when the thread waits for it, and not before.
void copy_asynchronously(void* to, const void* from);  // 16 bytes
void close_group();
void wait_for_groups(size_t most);  // for all but so many of the newest

// The GPU that kernels should take this for: the compute capability times ten.
int architecture();

template <class T>
T shuffle_xor(unsigned mask, T value, int lanes, const char* file, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = shuffle_xor_bits(mask, bits, lanes, file, line);
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace emulated

extern emulated::Index threadIdx, blockIdx, blockDim;

// The instructions of a warp and of its tensor core, each in one function: PTX on a GPU, and in the
// emulation the same through core/fragments.h.
#pragma once

#include "core/fragments.h"
#include "vectors.h"

namespace dfq {

// The compute capability times ten. As a constant: what another GPU would do is not compiled.
#if defined(__CUDA_ARCH__)
DFQ_DEVICE constexpr int architecture() { return __CUDA_ARCH__ / 10; }
#elif defined(DFQ_EMULATE_CUDA)
inline int architecture() { return emulated::architecture(); }
#else
constexpr int architecture() { return 0; }  // the host compiles kernels, and runs none
#endif

DFQ_DEVICE constexpr bool copies_asynchronously(int architecture) { return architecture >= 80; }
DFQ_DEVICE constexpr bool multiplies_int4(int architecture) { return architecture < 90; }

#if defined(__CUDA_ARCH__)
DFQ_DEVICE uint32_t shared_address(const void* memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}
#endif

// Starts to copy 16 bytes to shared memory; there they are for this thread when it has waited.
DFQ_DEVICE void copy_asynchronously(uint4* to, const void* from) {
  DFQ_ASSERT_ALIGNED(from);
#if defined(DFQ_EMULATE_CUDA)
  emulated::copy_asynchronously(to, from);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
#endif
}
// What was started until now is a group; waits for all but the newest `kMost` groups.
DFQ_DEVICE void close_group() {
#if defined(DFQ_EMULATE_CUDA)
  emulated::close_group();
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kMost>
DFQ_DEVICE void wait_for_groups() {
#if defined(DFQ_EMULATE_CUDA)
  emulated::wait_for_groups(kMost);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kMost) : "memory");
#endif
}

// Four words from the segments that the lanes name.
DFQ_DEVICE void load_words(uint32_t (&words)[4], const uint4* named) {
#if defined(DFQ_EMULATE_CUDA)
  const auto* all = static_cast<const uint4* const*>(
      emulated::exchange(&named, sizeof(named), __FILE__, __LINE__));
  const int lane = static_cast<int>(threadIdx.x % kWarp);
  for (int i = 0; i < 4; ++i) {
    memcpy(&words[i], reinterpret_cast<const char*>(all[namer(lane, i)]) + lane % 4 * 4, 4);
  }
#elif defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(named))
               : "memory");
#endif
}

// Adds to a quarter of the sums: eight rows, 16 bytes along K. All that the oldest GPUs multiply.
template <bool kInt4>
DFQ_DEVICE void multiply_quarter(int32_t& first, int32_t& second, uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  if constexpr (kInt4) {
    asm("mma.sync.aligned.m8n8k32.row.col.s32.s4.s4.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(first), "+r"(second)
        : "r"(a), "r"(b));
  } else {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(first), "+r"(second)
        : "r"(a), "r"(b));
  }
#endif
}

// Adds the product to the sums.
template <bool kInt4>
DFQ_DEVICE void multiply(int32_t (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(DFQ_EMULATE_CUDA)
  const Fragments given = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  const auto* warp =
      static_cast<const Fragments*>(emulated::exchange(&given, sizeof(given), __FILE__, __LINE__));
  for (int i = 0; i < 4; ++i) {
    sums[i] += product<kInt4>(warp, cell_of_sum(static_cast<int>(threadIdx.x % kWarp), i));
  }
#elif __CUDA_ARCH__ >= 800
  if constexpr (kInt4) {
    asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#elif defined(__CUDA_ARCH__)
  multiply_quarter<kInt4>(sums[0], sums[1], a[0], b0);
  multiply_quarter<kInt4>(sums[0], sums[1], a[2], b1);
  multiply_quarter<kInt4>(sums[2], sums[3], a[1], b0);
  multiply_quarter<kInt4>(sums[2], sums[3], a[3], b1);
#endif
}

}  // namespace dfq

// Integers of one grid as integers of another: sixteen bytes read and sixteen written at a time.
// The specification is dfq_kernels/requantize.py; the integers are equal to it.
#include "core/requantize.h"
#include "requantize.h"
#include "vectors.h"

namespace dfq {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 2;  // that a thread loads before it waits
constexpr int kFour = 4;     // integers in a word
constexpr int kStep = kThreads * kLanes<int8_t>, kBlock = kStep * kVectors;

// 2^23 plus byte `i` of a word: in a mantissa it needs no conversion.
DFQ_DEVICE float in_mantissa(uint32_t word, int i) {
#if defined(__CUDA_ARCH__)
  return bits_of<float>(__byte_perm(word, 0x4b000000u, 0x7440u | i));
#else
  return bits_of<float>((word >> 8 * i & 0xffu) | 0x4b000000u);
#endif
}

// Four codes.
DFQ_DEVICE uint32_t requantize_word(const Requantizer& grids, uint32_t word) {
  const float shift = static_cast<float>((1 << 23) + 128 + grids.zero);
  uint32_t result = 0;
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    const float code = in_mantissa(word ^ 0x80808080u, i) - shift;
    const int8_t found =
        requantize(code * grids.scale * grids.inverse, grids.new_zero, grids.low, grids.high);
    result |= static_cast<uint32_t>(static_cast<uint8_t>(found)) << 8 * i;
  }
  return result;
}

__global__ void __launch_bounds__(kThreads)
    requantize_codes(const Requantizer grids, const int8_t* codes, int8_t* out, int64_t count,
                     bool vectors) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kBlock;
  if (!vectors || begin + kBlock > count) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    DFQ_ROLLED
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      out[i] = static_cast<int8_t>(requantize_word(grids, static_cast<uint8_t>(codes[i])));
    }
    return;
  }
  const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * kLanes<int8_t>;
  uint4 loaded[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    loaded[i] = load_vector(codes + first + i * kStep);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    store_vector(out + first + i * kStep,
                 {requantize_word(grids, loaded[i].x), requantize_word(grids, loaded[i].y),
                  requantize_word(grids, loaded[i].z), requantize_word(grids, loaded[i].w)});
  }
}

}  // namespace

Failure requantize(const Requantizer& grids, const int8_t* codes, int8_t* out, int64_t count,
                   void* stream) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  const bool vectors = reinterpret_cast<uintptr_t>(codes) % 16 == 0;
  return launch(&requantize_codes, blocks, kThreads, stream, grids, codes, out, count, vectors);
}

}  // namespace dfq

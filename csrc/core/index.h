// Arithmetic of indices.
#pragma once

#include "core/arithmetic.h"

// Before a loop that a GPU should not unroll: its body is large, or needs no speed.
#if defined(__CUDACC__)
#define DFQ_ROLLED _Pragma("unroll 1")
#else
#define DFQ_ROLLED
#endif

namespace dfq {

// a / b, of what is not negative. Most indices fit 32 bits, where a GPU is several times faster.
DFQ_HOST_DEVICE int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) {
    return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  }
  return static_cast<int64_t>(static_cast<uint64_t>(a) / static_cast<uint64_t>(b));
}

}  // namespace dfq

// The instructions for the four bytes of a word.
#pragma once

#include "core/storage.h"
#include "launch.h"

namespace dfq {

// Of the bytes of a, 0 to 3, and of b, 4 to 7, those that the hexadecimal digits of `which` name.
DFQ_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t which) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, which);
#else
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(both >> (which >> 4 * i & 7u) * 8 & 0xffu) << 8 * i;
  }
  return result;
#endif
}

// Byte i of word j becomes byte j of word i.
DFQ_DEVICE void transpose_bytes(uint32_t (&words)[4]) {
  const uint32_t low[2] = {permute_bytes(words[0], words[1], 0x5140),
                           permute_bytes(words[2], words[3], 0x5140)};
  const uint32_t high[2] = {permute_bytes(words[0], words[1], 0x7362),
                            permute_bytes(words[2], words[3], 0x7362)};
  words[0] = permute_bytes(low[0], low[1], 0x5410);
  words[1] = permute_bytes(low[0], low[1], 0x7632);
  words[2] = permute_bytes(high[0], high[1], 0x5410);
  words[3] = permute_bytes(high[0], high[1], 0x7632);
}

}  // namespace dfq

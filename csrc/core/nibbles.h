// Two 4-bit integers a byte, in two's complement; dfq_kernels/packing.py describes the format.
#pragma once

#include <cstdint>

#include "core/arithmetic.h"

namespace dfq {

constexpr int64_t kPackBlock = 64;  // elements along K, in half as many bytes

// Where element k of a row lies: its byte, and whether in the upper four bits.
DFQ_HOST_DEVICE int64_t packed_byte(int64_t k) {
  return k / kPackBlock * (kPackBlock / 2) + k % (kPackBlock / 2);
}
DFQ_HOST_DEVICE bool packed_in_upper(int64_t k) { return k % kPackBlock >= kPackBlock / 2; }
DFQ_HOST_DEVICE int64_t packed_size(int64_t elements) {
  return (elements + kPackBlock - 1) / kPackBlock * (kPackBlock / 2);
}

DFQ_HOST_DEVICE uint8_t pack_nibbles(int32_t lower, int32_t upper) {
  return static_cast<uint8_t>((lower & 0x0f) | (upper & 0x0f) << 4);
}

// Sixteen times the integer: no sign has to be brought in.
DFQ_HOST_DEVICE int8_t lower_nibble_times_16(uint8_t byte) {
  return static_cast<int8_t>(static_cast<uint8_t>(byte << 4));
}
DFQ_HOST_DEVICE int8_t upper_nibble_times_16(uint8_t byte) {
  return static_cast<int8_t>(byte & 0xf0);
}

// The same of the four bytes of a word.
DFQ_HOST_DEVICE uint32_t lower_nibbles_times_16(uint32_t bytes) { return bytes << 4 & 0xf0f0f0f0u; }
DFQ_HOST_DEVICE uint32_t upper_nibbles_times_16(uint32_t bytes) { return bytes & 0xf0f0f0f0u; }

DFQ_HOST_DEVICE int8_t unpack_nibble(uint8_t byte, bool upper) {
  const int8_t times_16 = upper ? upper_nibble_times_16(byte) : lower_nibble_times_16(byte);
  return static_cast<int8_t>(times_16 / 16);
}

}  // namespace dfq

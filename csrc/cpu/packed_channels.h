// Packed 4-bit activations: sixty-four channels in thirty-two bytes (core/nibbles.h). The layers
// compute on bytes; what is packed is unpacked before them, and packed again behind.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"
#include "core/nibbles.h"

namespace dfq {

using torch::headeronly::MemoryFormat;

constexpr int64_t kHalfBlock = kPackBlock / 2;
constexpr int64_t kPackedSpan = 1024;  // blocks that a thread takes at once

struct UnpackChannels {
  template <int W>
  static DFQ_INLINE void run(const uint8_t* from, int64_t blocks, int8_t* to) {
    for (int64_t i = 0; i < blocks; ++i, from += kHalfBlock, to += kPackBlock) {
      for (int64_t j = 0; j < kHalfBlock; ++j) {
        to[j] = static_cast<int8_t>(((from[j] & 15) ^ 8) - 8);
        to[kHalfBlock + j] = static_cast<int8_t>(((from[j] >> 4) ^ 8) - 8);
      }
    }
  }
};

struct PackChannels {
  template <int W>
  static DFQ_INLINE void run(const int8_t* from, int64_t blocks, uint8_t* to) {
    for (int64_t i = 0; i < blocks; ++i, from += kPackBlock, to += kHalfBlock) {
      for (int64_t j = 0; j < kHalfBlock; ++j) {
        to[j] = pack_nibbles(from[j], from[kHalfBlock + j]);
      }
    }
  }
};

// Kernel::run on all `blocks` of sixty-four channels.
template <class Kernel, int64_t kFrom, int64_t kTo, class From, class To>
void for_each_block(const From* from, int64_t blocks, To* to) {
  for_each_chunk(ceil_div(blocks, kPackedSpan), [&](int64_t chunk) {
    const int64_t begin = chunk * kPackedSpan, count = std::min(kPackedSpan, blocks - begin);
    run<Kernel>(from + begin * kFrom, count, to + begin * kTo);
  });
}

inline bool is_packed(const Tensor& codes) { return codes.scalar_type() == ScalarType::Byte; }

// int8, of `sizes`, whose memory is laid out as that of `codes`, which are packed.
inline Tensor unpack_channels(const Tensor& codes, const std::vector<int64_t>& sizes,
                              MemoryFormat layout) {
  const Tensor out = torch::stable::empty(sizes, ScalarType::Char, std::nullopt, codes.device(),
                                          std::nullopt, layout);
  STD_TORCH_CHECK(codes.numel() % kHalfBlock == 0 && out.numel() == 2 * codes.numel(),
                  "packed activations have a multiple of 64 channels");
  for_each_block<UnpackChannels, kHalfBlock, kPackBlock>(
      data<uint8_t>(codes), codes.numel() / kHalfBlock, mutable_data<int8_t>(out));
  return out;
}

inline Tensor pack_channels(const Tensor& codes, const std::vector<int64_t>& sizes,
                            MemoryFormat layout) {
  const Tensor out = torch::stable::empty(sizes, ScalarType::Byte, std::nullopt, codes.device(),
                                          std::nullopt, layout);
  for_each_block<PackChannels, kPackBlock, kHalfBlock>(
      data<int8_t>(codes), codes.numel() / kPackBlock, mutable_data<uint8_t>(out));
  return out;
}

}  // namespace dfq

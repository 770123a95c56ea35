// Which elements QDrop leaves float: bytes for any range of positions, sixteen at a time.
#pragma once

#include "common.h"

namespace dfq {

// Four counters, four words each, lie in memory as the sixteen words of sixteen elements. Words 0
// and 2 are multiplied where they lie, in the even lanes; their products take two lanes each.
template <int N, int W, int... I>
DFQ_INLINE Block<uint32_t, N, W> philox_round(Block<uint32_t, N, W> state,
                                              Block<uint32_t, N, W> multiplier,
                                              Block<uint32_t, N, W> key,
                                              std::integer_sequence<int, I...> lanes) {
  if constexpr (N == W) {
    using Wide = native<uint64_t, W / 2>;
    const auto even = ((Wide)state.v & 0xffffffffu) * (Wide)multiplier.v;  // low0 high0 low1 high1
    const auto odd = (native<uint32_t, W>)((Wide)state.v >> 32);           // word1 0 word3 0
    const auto product = (native<uint32_t, W>)even;
    return {__builtin_shufflevector(product, product, (I ^ 3)...) ^ odd ^ key.v};
  } else {
    return {philox_round(state.lo, multiplier.lo, key.lo, lanes),
            philox_round(state.hi, multiplier.hi, key.hi, lanes)};
  }
}

// low, 0, high, 0, and again for every four lanes.
template <int W>
DFQ_INLINE Words<W> even_words(uint32_t low, uint32_t high) {
  const uint32_t lanes[kLanes] = {low, 0, high, 0, low, 0, high, 0,
                                  low, 0, high, 0, low, 0, high, 0};
  Words<W> out;
  load_plain(lanes, out);
  return out;
}

struct DropMask {
  static constexpr int kAtOnce = 4;  // blocks whose rounds interleave: one alone is all latency

  // keep[i] is all ones if the element at position 16 * block + i stays float, else 0; i runs over
  // 16 * blocks elements, and blocks is a multiple of kAtOnce.
  template <int W>
  static DFQ_INLINE void run(uint64_t seed, int32_t threshold, uint64_t block, int64_t blocks,
                             uint32_t* keep) {
    const auto key = even_words<W>(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const uint64_t first[kLanes / 2] = {4 * block,     0, 4 * block + 1, 0,
                                        4 * block + 2, 0, 4 * block + 3, 0};
    constexpr uint64_t kStep[kLanes / 2] = {4, 0, 4, 0, 4, 0, 4, 0};
    Block<uint64_t, kLanes / 2, W / 2> counters, step;
    load_plain(first, counters);
    load_plain(kStep, step);
    Mask<W> bound;
    fill(bound, threshold);
    for (int64_t i = 0; i < blocks; i += kAtOnce) {
      Words<W> state[kAtOnce];
      for (auto& one : state) {
        one = halves(counters);
        counters = counters + step;
      }
      ten_rounds(state, key);
      for (int j = 0; j < kAtOnce; ++j) {
        const auto stays = where(bits_as<int32_t>(shift_right<8>(state[j])) < bound,
                                 words<W>(0xffffffffu), words<W>(0));
        store_plain(keep + kLanes * (i + j), stays);
      }
    }
  }

 private:
  template <int W>
  static DFQ_INLINE void ten_rounds(Words<W>* state, Words<W> key) {
    const auto multiplier = even_words<W>(kPhiloxMultiplier[0], kPhiloxMultiplier[1]);
    const auto weyl = even_words<W>(kPhiloxWeyl[0], kPhiloxWeyl[1]);
    for (int round = 0; round < 10; ++round, key = key + weyl) {
      for (int j = 0; j < kAtOnce; ++j) {
        state[j] = philox_round(state[j], multiplier, key, std::make_integer_sequence<int, W>());
      }
    }
  }
  template <int N, int W>
  static DFQ_INLINE Block<uint32_t, 2 * N, 2 * W> halves(Block<uint64_t, N, W> a) {
    if constexpr (N == W) {
      return {(native<uint32_t, 2 * W>)a.v};
    } else {
      return {halves(a.lo), halves(a.hi)};
    }
  }
};

}  // namespace dfq

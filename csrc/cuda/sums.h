// Sums over channels in two stages, each in an order that depends on the shape alone: the blocks
// write theirs, and a second kernel adds up those of each channel.
#pragma once

#include "core/blocks.h"
#include "launch.h"

namespace dfq {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;

// The sum over `group` neighbouring lanes of a warp, in all of them.
template <class F>
DFQ_DEVICE Pair<F> sum_over_lanes(Pair<F> sums, int group) {
  for (int distance = group / 2; distance > 0; distance /= 2) {
    sums.first += __shfl_xor_sync(kWholeWarp, sums.first, distance);
    sums.second += __shfl_xor_sync(kWholeWarp, sums.second, distance);
  }
  return sums;
}

// What a thread sums of a channel, or of each lane of its vectors. Other such types have the same
// functions: they may start from an x to expect, count, take an x that adds nothing (beside a
// gradient of 0), and give terms that depend on an origin that all columns of a slot have.
struct PlainSums : Pair<float> {
  DFQ_DEVICE void start(float) {}
  DFQ_DEVICE void end(int) {}
  DFQ_DEVICE float nothing() const { return 0; }
  template <class Columns>
  static DFQ_DEVICE float origin(const PlainSums*, const Columns&, int, int) {
    return 0;
  }
  DFQ_DEVICE Pair<float> terms(float) const { return *this; }
};

// Which columns of a block belong to a slot, in units of what has one pair of sums: a vector if
// all its lanes are of one channel, else an element.
struct SlotColumns {
  int count = 0;
  int begin = 0;     // the first
  int run = 1;       // neighbours
  int next_run = 0;  // from a run to the next

  SlotColumns() = default;
  DFQ_DEVICE SlotColumns(const Blocks& blocks, const Place& at, int64_t slot, int unit) {
    const int64_t held = blocks.columns_held();
    if (!blocks.by_channel()) {
      const int64_t end = (at.run + slot + 1) * blocks.run;
      const int64_t block_end = at.column + blocks.block_width();
      const int64_t from = blocks.first(at, slot) - at.begin;
      begin = static_cast<int>((from - at.column) / unit);
      count = static_cast<int>(((end < block_end ? end : block_end) - from) / unit);
      run = count;
      next_run = 0;
    } else if (blocks.piece_channels == 1) {
      begin = 0;
      count = static_cast<int>((held + unit - 1) / unit);
      run = count;
      next_run = 0;
    } else {
      run = static_cast<int>(blocks.run / unit);
      begin = static_cast<int>(slot) * run;
      next_run = run * static_cast<int>(blocks.channels);
      count = static_cast<int>(held / blocks.channels / unit);
    }
  }
  DFQ_DEVICE int operator[](int i) const {
    return run == 1 ? begin + i * next_run : begin + i / run * next_run + i % run;
  }
};

// f(slot, sums, origin) once for each slot, with the sums over its columns. `columns` holds what
// was summed for each unit of the block and is in shared memory; all threads take part.
template <class Sums, class F>
DFQ_DEVICE void for_each_slot(const Blocks& blocks, const Place& at, int unit, const Sums* columns,
                              const F& f) {
  const int slots = static_cast<int>(blocks.slots(at));
  int group = 1;  // threads to a slot
  while (group < kWarp && slots * group * 2 <= static_cast<int>(blockDim.x)) {
    group *= 2;
  }
  const int at_once = static_cast<int>(blockDim.x) / group;
  const int thread = static_cast<int>(threadIdx.x), member = thread % group;
  for (int begin = 0; begin < slots; begin += at_once) {
    const int slot = begin + thread / group;
    SlotColumns of_slot;
    if (slot < slots) {
      of_slot = SlotColumns(blocks, at, slot, unit);
    }
    const float origin = Sums::origin(columns, of_slot, member, group);
    Pair<double> sums{0, 0};
    for (int i = member; i < of_slot.count; i += group) {
      const auto terms = columns[of_slot[i]].terms(origin);
      sums.first += terms.first;
      sums.second += terms.second;
    }
    sums = sum_over_lanes(sums, group);
    if (slot < slots && member == 0) {
      f(slot, sums, origin);
    }
  }
}

// The second stage: one block a channel. `finish` has
//   Pair<double> term(entry place, slot, the block's sums, those of entry 0): what is added up, and
//   void operator()(channel, the sum, the block's sums of entry 0): what is done with it.
constexpr int kFinishThreads = 256;

template <class Finish>
DFQ_DEVICE void finish_channel(const Finish& finish, const Blocks& blocks,
                               const Pair<double>* partials, int64_t channel) {
  DFQ_SHARED(Pair<double>, of_warps, kFinishThreads / kWarp);
  const auto sums_of = [&](const Blocks::Entry& entry) {
    return partials[entry.block * blocks.most_slots() + entry.slot];
  };
  const Pair<double> origin = sums_of(blocks.entry(channel, 0));
  Pair<double> sums{0, 0};
  const int64_t entries = blocks.entries();
  for (int64_t i = threadIdx.x; i < entries; i += blockDim.x) {
    const auto entry = blocks.entry(channel, i);
    if (entry.block >= 0) {
      const Pair<double> term = finish.term(blocks, entry, sums_of(entry), origin);
      sums.first += term.first;
      sums.second += term.second;
    }
  }
  sums = sum_over_lanes(sums, kWarp);
  if (threadIdx.x % kWarp == 0) {
    of_warps[threadIdx.x / kWarp] = sums;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned warp = 1; warp < blockDim.x / kWarp; ++warp) {
      sums.first += of_warps[warp].first;
      sums.second += of_warps[warp].second;
    }
    finish(channel, sums, origin);
  }
}

inline int finish_threads(const Blocks& blocks) {
  return static_cast<int>(
      std::min<int64_t>(kFinishThreads, round_up(std::max<int64_t>(blocks.entries(), 1), kWarp)));
}

}  // namespace dfq

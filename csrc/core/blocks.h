// How a dense tensor is cut among blocks of GPU threads, and where the sums of a channel are
// found again: by its shape and its element size alone, so that results have the same bits on
// every GPU.
//
// In memory order a tensor is periods of `channels` runs of `run` neighbours each. A thread takes
// a vector of neighbours, then the vector `width` further on, and so forth for `steps`; `width` is
// whole periods, so each of its lanes stays with one channel. Where there are few periods of long
// runs, each run is a piece of its own, and so is one channel.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "core/index.h"

namespace dfq {

constexpr int kMaxThreads = 256;         // of a block
constexpr int64_t kFewPeriods = 8;       // fewer make long runs pieces of their own
constexpr int64_t kLongRun = 1024;       // vectors
constexpr int64_t kBlocksToFill = 1024;  // a large GPU; more steps make no sense below it
constexpr int64_t kMostSteps = 16;       // a float32 sum of more would lose accuracy

// Where a block is.
struct Place {
  int64_t index;  // among all blocks
  int64_t piece;
  int64_t begin;   // of its first step, in its piece
  int64_t column;  // the first of its columns: positions in begin .. begin + width
  int64_t run;     // the run that holds `column`
  int steps;
};

struct Blocks {
  int64_t size;            // of a piece
  int64_t pieces;          // one after another
  int64_t run;             // neighbours of one channel
  int64_t channels;        // of the tensor
  int64_t piece_channels;  // of a piece: all or one
  int64_t width;           // from a thread's vector to its next
  int64_t splits;          // blocks of steps that follow one another in a piece
  int64_t columns;         // blocks that share a width
  int steps;               // vectors of a thread, at most
  int lanes;               // elements of a vector
  int threads;             // of a block

  int64_t count() const { return pieces * splits * columns; }

  DFQ_HOST_DEVICE int64_t block_width() const { return static_cast<int64_t>(threads) * lanes; }

  DFQ_HOST_DEVICE Place place(int64_t index) const {
    const int64_t before = quotient(index, columns);
    Place at;
    at.index = index;
    at.piece = quotient(before, splits);
    const int64_t split = before - at.piece * splits;
    at.begin = split * steps * width;
    at.column = (index - before * columns) * block_width();
    at.run = quotient(at.column, run);
    at.steps = steps;
    return at;
  }

  DFQ_HOST_DEVICE int64_t channel(const Place& at, int64_t run_index) const {
    const int64_t index = at.piece + run_index;
    return index - quotient(index, channels) * channels;
  }

  // The sums of a block come in slots: one a channel if the block holds a whole width, and
  // otherwise one for each run that it touches.
  DFQ_HOST_DEVICE bool by_channel() const { return columns == 1; }
  DFQ_HOST_DEVICE int64_t columns_held() const { return width < size ? width : size; }
  DFQ_HOST_DEVICE int64_t most_slots() const {
    return by_channel() ? piece_channels : quotient(block_width() - 1, run) + 2;
  }
  DFQ_HOST_DEVICE int64_t slots(const Place& at) const {
    if (by_channel()) {
      return piece_channels;
    }
    const int64_t end = at.column + block_width();
    return quotient((end < columns_held() ? end : columns_held()) - 1, run) - at.run + 1;
  }
  DFQ_HOST_DEVICE int64_t slot(const Place& at, int64_t run_index) const {
    return by_channel() ? run_index - quotient(run_index, piece_channels) * piece_channels
                        : run_index - at.run;
  }
  // The first position of a slot's channel in the block, in its piece; may be past its end.
  DFQ_HOST_DEVICE int64_t first(const Place& at, int64_t slot) const {
    const int64_t begin = (at.run + slot) * run;
    return at.begin + (begin > at.column ? begin : at.column);
  }
  // How many elements of a slot's channel are in the block.
  DFQ_HOST_DEVICE int64_t elements(const Place& at, int64_t slot) const {
    if (by_channel()) {
      const int64_t rest = size - at.begin;
      const int64_t most = steps * width;
      return quotient(rest < most ? rest : most, piece_channels);
    }
    const int64_t begin = first(at, slot);
    if (begin >= size) {
      return 0;
    }
    const int64_t run_end = (at.run + slot + 1) * run, block_end = at.column + block_width();
    const int64_t wide = at.begin + (run_end < block_end ? run_end : block_end) - begin;
    const int64_t deep = quotient(size - begin + width - 1, width);
    return wide * (deep < steps ? deep : steps);
  }

  // The sums of a channel are in the entries 0 .. entries() - 1, some of them of no block.
  DFQ_HOST_DEVICE int64_t spans() const {
    return by_channel() ? 1 : quotient(run - 1, block_width()) + 2;
  }
  DFQ_HOST_DEVICE int64_t entries() const {
    if (by_channel()) {
      return splits * (piece_channels == channels ? 1 : quotient(pieces, channels));
    }
    return splits * spans() * quotient(columns_held(), run * channels);
  }
  struct Entry {
    int64_t block;  // -1: of none
    int64_t slot;
  };
  DFQ_HOST_DEVICE Entry entry(int64_t channel, int64_t index) const {
    const int64_t before = quotient(index, splits), split = index - before * splits;
    if (by_channel()) {
      const bool whole = piece_channels == channels;
      const int64_t piece = whole ? 0 : channel + before * channels;
      return {piece * splits + split, whole ? channel : 0};
    }
    const int64_t period = quotient(before, spans());
    const int64_t run_index = channel + period * channels;
    const int64_t column = quotient(run_index * run, block_width()) + (before - period * spans());
    const bool holds = column * block_width() < (run_index + 1) * run && column < columns;
    return {holds ? split * columns + column : -1,
            run_index - quotient(column * block_width(), run)};
  }
};

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// For `periods` times `channels` runs of `run` elements, none of them 0, in vectors of `lanes`.
inline Blocks cut(int64_t periods, int64_t channels, int64_t run, int lanes) {
  Blocks blocks;
  blocks.lanes = lanes;
  blocks.channels = channels;
  blocks.run = channels == 1 ? periods * run : run;
  const bool pieces =
      channels > 1 && periods < kFewPeriods && run % lanes == 0 && run >= kLongRun * lanes;
  blocks.piece_channels = pieces ? 1 : channels;
  blocks.pieces = pieces ? periods * channels : 1;
  blocks.size = pieces ? run : periods * channels * run;

  const int64_t most = static_cast<int64_t>(kMaxThreads) * lanes;
  const int64_t whole = round_up(blocks.size, lanes);
  const int64_t period =
      blocks.piece_channels == 1 ? lanes : std::lcm(channels * run, int64_t{lanes});
  blocks.width = std::min(whole, period < most ? most / period * period : period);

  blocks.columns = (blocks.width + most - 1) / most;
  const int64_t vectors = blocks.width / lanes;
  blocks.threads = static_cast<int>(round_up((vectors + blocks.columns - 1) / blocks.columns, 32));

  const int64_t deep = (blocks.size + blocks.width - 1) / blocks.width;
  const int64_t enough = deep * blocks.columns * blocks.pieces / kBlocksToFill;
  // what a block sums should be several times what it writes of sums
  const int64_t least = std::min<int64_t>(8, 8 * blocks.most_slots() / blocks.block_width() + 1);
  const int64_t steps = std::max(least, std::min(enough, kMostSteps));
  blocks.steps = static_cast<int>(std::min(steps, deep));
  blocks.splits = (deep + blocks.steps - 1) / blocks.steps;
  return blocks;
}

}  // namespace dfq

// The way of threads through dense outputs: one pass over memory, vector by vector, with sums over
// channels. What is done to an element is the op's. An op has
//
//   kInputs             1: x, or 2: x and a gradient
//   kDrops              whether it uses QDrop: then it has `seed` and `threshold`
//   Channel             what it must know about a channel
//   channel(c)          that of channel c
//   Sums                what a thread sums: NoSums, or as PlainSums
//   element(channel, Element, Sums&)    the output; adds to the sums
//   partial(sums, origin, n)    what a block writes of the sums of a channel's n elements
//   out, partials       where to; null if nobody needs them
#pragma once

#include "core/arithmetic.h"
#include "core/blocks.h"
#include "launch.h"
#include "sums.h"
#include "vectors.h"

namespace dfq {

struct NoSums {
  DFQ_DEVICE void start(float) {}
  DFQ_DEVICE float nothing() const { return 0; }
};

struct Element {
  float x, grad;
  bool stays;  // float: QDrop
};

// One thread in a block. kEach: each lane of a vector has a channel of its own.
template <class T, bool kEach, class Op, class Source>
class Walker {
 public:
  using Channel = typename Op::Channel;
  using Sums = typename Op::Sums;
  static constexpr int kVector = kLanes<T>;
  static constexpr int kChannels = kEach ? kVector : 1;
  static constexpr int kAhead = Source::kAhead;

  DFQ_DEVICE Walker(const Op& op, const Source& source, const Blocks& blocks, const Place& at)
      : op_(op), source_(source), end_((at.piece + 1) * blocks.size) {
    const int64_t column = at.column + static_cast<int64_t>(threadIdx.x) * kVector;
    int64_t position = at.piece * blocks.size + at.begin + column;
    if (static_cast<int>(threadIdx.x) >= blocks.threads || column >= blocks.width ||
        position >= end_) {
      return;
    }
    Vectors next[kAhead + 1];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      fetch(next[i], i < at.steps, position + i * blocks.width);
    }
    load_channels(blocks, at, column);
    DFQ_ROLLED
    for (int step = 0; step < at.steps && position < end_; ++step) {
      fetch(next[kAhead], step + kAhead < at.steps, position + kAhead * blocks.width);
      if (step == 0) {
        const bool both =
            kAhead > 0 && at.steps > 1 && count_at(position + blocks.width) == kVector;
        start(next[0], next[kAhead > 0], both, count_at(position));
      }
      visit(next[0], position);
      position += blocks.width;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        next[i] = next[i + 1];
      }
    }
  }

  // What it summed: of lane i, or of all lanes.
  DFQ_DEVICE Sums sums(int i) const {
    Sums sums = sums_[i];
    sums.end(kEach ? visited_ + (i < part_) : visited_ * kVector + part_);
    return sums;
  }

 private:
  struct Vectors {
    uint4 input[Op::kInputs];
  };

  DFQ_DEVICE void load_channels(const Blocks& blocks, const Place& at, int64_t column) {
    const int64_t run = quotient(column, blocks.run);
    int64_t within = column - run * blocks.run;
    int64_t channel = blocks.channel(at, run);
    channel_[0] = op_.channel(channel);
#pragma unroll
    for (int lane = 1; lane < kChannels; ++lane) {
      channel_[lane] = channel_[lane - 1];
      if (++within == blocks.run) {
        within = 0;
        channel = channel + 1 == blocks.channels ? 0 : channel + 1;
        channel_[lane] = op_.channel(channel);
      }
    }
  }

  // How many elements of a vector are in the piece: at its end fewer than elsewhere, or none.
  DFQ_DEVICE int count_at(int64_t position) const {
    return position + kVector <= end_ ? kVector : static_cast<int>(end_ - position);
  }

  // The vectors at a position, if it is wanted and there.
  DFQ_DEVICE void fetch(Vectors& fetched, bool wanted, int64_t position) const {
    if (!wanted || position >= end_) {
      return;
    }
    const int count = count_at(position);
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) {
      fetched.input[i] = count == kVector ? source_.template vector<T>(i, position)
                                          : source_.template part<T>(i, position, count);
    }
  }

  DFQ_DEVICE void visit(const Vectors& vectors, int64_t position) {
    float x[kVector], grad[kVector], out[kVector];
    unpack<T>(vectors.input[0], x);
    if constexpr (Op::kInputs == 2) {
      unpack<T>(vectors.input[1], grad);
    }
    const int count = count_at(position);
    const bool whole = count == kVector;
    if (!whole) {
      leave_out(count, x);
    }
    visit_elements(position, x, grad, out);
    visited_ += whole;
    part_ = whole ? 0 : count;
    if (op_.out && whole) {
      source_.template store<T>(op_.out, position, pack<T>(out));
    } else if (op_.out) {
      source_.template store_part<T>(op_.out, position, pack<T>(out), count);
    }
  }

  // What is not there adds nothing to the sums; a gradient that is not there is 0.
  DFQ_DEVICE void leave_out(int count, float (&x)[kVector]) const {
#pragma unroll
    for (int lane = 0; lane < kVector; ++lane) {
      x[lane] = lane < count ? x[lane] : sums_[kEach ? lane : 0].nothing();
    }
  }

  // Tells the sums what x to expect of each channel: the mean of the first ones, as short as x is.
  DFQ_DEVICE void start(const Vectors& first, const Vectors& second, bool both, int count) {
    float x[kVector], more[kVector];
    unpack<T>(first.input[0], x);
    unpack<T>(second.input[0], more);
    float sum = 0;
#pragma unroll
    for (int lane = 0; lane < kVector; ++lane) {
      const float mean = both ? (x[lane] + more[lane]) / 2 : x[lane];
      if constexpr (kEach) {
        sums_[lane].start(to_float(from_float<T>(mean)));
      } else {
        sum += lane < count ? mean : 0;
      }
    }
    if constexpr (!kEach) {
      sums_[0].start(to_float(from_float<T>(sum / static_cast<float>(count))));
    }
  }

  DFQ_DEVICE void visit_elements(int64_t position, const float (&x)[kVector],
                                 const float (&grad)[kVector], float (&out)[kVector]) {
    bool stays[kVector];
    if constexpr (Op::kDrops) {
      if (op_.threshold > 0) {
        draw(position, stays);
        return visit_elements<true>(x, grad, stays, out);
      }
    }
    visit_elements<false>(x, grad, stays, out);
  }
  template <bool kDrop>
  DFQ_DEVICE void visit_elements(const float (&x)[kVector], const float (&grad)[kVector],
                                 const bool (&stays)[kVector], float (&out)[kVector]) {
#pragma unroll
    for (int lane = 0; lane < kVector; ++lane) {
      const int own = kEach ? lane : 0;
      const Element element{x[lane], Op::kInputs == 2 ? grad[lane] : 0.0f, kDrop && stays[lane]};
      out[lane] = op_.element(channel_[own], element, sums_[own]);
    }
  }

  // Which elements QDrop leaves as they are.
  DFQ_DEVICE void draw(int64_t position, bool (&stays)[kVector]) const {
    const uint64_t seed = static_cast<uint64_t>(*op_.seed);
#pragma unroll
    for (int lane = 0; lane < kVector; lane += 4) {
      const Words4 words = philox(seed, static_cast<uint64_t>(position + lane) / 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        stays[lane + i] = dropped(words.word[i], op_.threshold);
      }
    }
  }

  const Op& op_;
  const Source& source_;
  const int64_t end_;  // of the piece
  Channel channel_[kChannels];
  Sums sums_[kChannels] = {};
  int visited_ = 0, part_ = 0;  // whole vectors; elements of the last one if it is not whole
};

// A block of a tensor: the outputs, and of each channel what the block sums.
template <class T, bool kEach, class Op, class Source>
DFQ_DEVICE void walk_block(const Op& op, const Source& source, const Blocks& blocks,
                           int64_t block) {
  using Thread = Walker<T, kEach, Op, Source>;
  const Place at = blocks.place(block);
  const Thread thread(op, source, blocks, at);
  if constexpr (!std::is_same_v<typename Op::Sums, NoSums>) {
    if (!op.partials) {
      return;
    }
    DFQ_SHARED(typename Op::Sums, columns, kMaxThreads * Thread::kChannels);
#pragma unroll
    for (int i = 0; i < Thread::kChannels; ++i) {
      columns[threadIdx.x * Thread::kChannels + i] = thread.sums(i);
    }
    __syncthreads();
    for_each_slot(blocks, at, kEach ? 1 : kLanes<T>, columns,
                  [&](int slot, const Pair<double>& sums, float origin) {
                    op.partials[block * blocks.most_slots() + slot] =
                        op.partial(sums, origin, blocks.elements(at, slot));
                  });
  }
}

template <class T, bool kEach, class Op, class Source>
__global__ void __launch_bounds__(kMaxThreads, 2)
    walk(const Op op, const Source source, const Blocks blocks) {
  walk_block<T, kEach>(op, source, blocks, blockIdx.x);
}

template <class Op>
Failure launch_walk(const Op& op, const Layout& layout, void* stream) {
  const Blocks& blocks = layout.blocks;
  const auto go = [&](auto kernel, const auto& source) {
    return launch(kernel, blocks.count(), blocks.threads, stream, op, source, blocks);
  };
  if (!layout.dense) {
    const Strided source{{layout.input[0], layout.input[1]}, layout.strides, layout.storage};
    return go(&walk<float, true, Op, Strided>, source);
  }
  const Dense source{{layout.input[0], layout.input[1]}};
  return with_storage(layout.storage, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return layout.one_channel() ? go(&walk<T, false, Op, Dense>, source)
                                : go(&walk<T, true, Op, Dense>, source);
  });
}

}  // namespace dfq

// What the ops, which know torch, and the kernels, which do not, tell each other.
#pragma once

#include "core/blocks.h"
#include "core/dimensions.h"

namespace dfq {

// Why a launch failed, or null.
using Failure = const char*;

enum class Storage { kFloat, kHalf, kBFloat16 };

// How an output is walked over, and where its inputs lie: as the output does, in vectors, or at
// any strides.
struct Layout {
  Blocks blocks;
  Storage storage;
  const void* input[kInputs];
  bool dense;
  Strides strides;  // if not dense

  // Whether every vector lies in one channel.
  bool one_channel() const { return blocks.channels == 1 || blocks.run % blocks.lanes == 0; }
};

// Two sums, of float32 in a thread and of float64 further on.
template <class F>
struct Pair {
  F first, second;
};

}  // namespace dfq

// The order in which an op with one dense output visits its inputs: in that output's memory
// order, with dimensions merged wherever all strides allow, so that any layout becomes rows.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common.h"
#include "core/dimensions.h"

namespace dfq {

struct MemoryOrder {
  std::vector<Dimension> outer;  // slowest first
  Dimension inner;               // neighbours in the output
  int64_t rows = 1;              // the product of the outer sizes

  // Where a row begins in each input, and its channel (0 if the channel varies within it).
  struct Row {
    int64_t offset[kInputs] = {0, 0};
    int64_t channel = 0;
  };
  Row row(int64_t index) const {
    Row found;
    for (auto dim = outer.rbegin(); dim != outer.rend(); ++dim) {
      const int64_t at = index % dim->size;
      index /= dim->size;
      for (int input = 0; input < kInputs; ++input) {
        found.offset[input] += at * dim->stride[input];
      }
      found.channel = dim->channel ? at : found.channel;
    }
    return found;
  }
};

// `output` is dense; `axis` is the channel dimension and is merged with no other.
inline MemoryOrder memory_order_of(const Tensor& output, const Tensor& x, const Tensor& grad,
                                   std::optional<int64_t> axis) {
  MemoryOrder order;
  order.outer = merged_dimensions(output, x, grad, axis);
  if (!order.outer.empty()) {
    order.inner = order.outer.back();
    order.outer.pop_back();
  }
  for (const Dimension& dim : order.outer) {
    order.rows *= dim.size;
  }
  return order;
}

// Short rows of channels that follow one another in every input become one row of several, of
// `shortest` to `longest` elements and whole vectors. The last row may then be a part of one.
inline void join_channel_rows(MemoryOrder& order, int64_t shortest, int64_t longest) {
  const Dimension& inner = order.inner;
  if (!inner.channel || order.outer.size() != 1) {
    return;
  }
  Dimension& outer = order.outer.front();
  for (int input = 0; input < kInputs; ++input) {
    if (inner.stride[input] != 1 || outer.stride[input] != inner.size) {
      return;
    }
  }
  int64_t together = 1;
  while (together * inner.size < shortest || together * inner.size % kLanes != 0) {
    ++together;
  }
  const int64_t length = together * inner.size;
  if (length <= longest) {
    order.rows = ceil_div(outer.size, together);
    outer = {order.rows, {length, length}, false};
    order.inner.size = length;
  }
}

}  // namespace dfq

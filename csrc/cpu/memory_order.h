// The order in which an op with one dense output visits its inputs: in that output's memory
// order, with dimensions merged wherever all strides allow, so that any layout becomes rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "common.h"

namespace dfq {

constexpr int kInputs = 2;  // x, and in backward the gradient

struct Dimension {
  int64_t size = 1;
  int64_t stride[kInputs] = {1, 1};  // of the inputs, in elements
  bool channel = false;

  // Whether `faster` continues within this one, so that both are one.
  bool holds(const Dimension& faster) const {
    bool merge = !channel && !faster.channel;
    for (int input = 0; input < kInputs; ++input) {
      merge = merge && stride[input] == faster.size * faster.stride[input];
    }
    return merge;
  }
};

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

// The dimensions of `output` in memory order, slowest first, merged where they can be.
inline std::vector<Dimension> merged_dimensions(const Tensor& output, const Tensor& x,
                                                const Tensor& grad, std::optional<int64_t> axis) {
  std::vector<int64_t> dims;
  for (int64_t d = 0; d < output.dim(); ++d) {
    if (output.size(d) != 1) {
      dims.push_back(d);
    }
  }
  std::stable_sort(dims.begin(), dims.end(),
                   [&](int64_t a, int64_t b) { return output.stride(a) > output.stride(b); });
  std::vector<Dimension> merged;
  for (const int64_t d : dims) {
    const Dimension dim{output.size(d), {x.stride(d), grad.stride(d)}, axis == d};
    if (!merged.empty() && merged.back().holds(dim)) {
      merged.back() = {merged.back().size * dim.size, {dim.stride[0], dim.stride[1]}, false};
    } else {
      merged.push_back(dim);
    }
  }
  return merged;
}

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

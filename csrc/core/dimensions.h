// The dimensions of a dense output in memory order, merged wherever all strides allow, and where
// a position in that order lies in inputs of any strides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/index.h"

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

// Slowest first. `axis` is the channel dimension and is merged with no other. A tensor here is
// whatever has dim(), size(d) and stride(d).
template <class AnyTensor>
std::vector<Dimension> merged_dimensions(const AnyTensor& output, const AnyTensor& x,
                                         const AnyTensor& grad, std::optional<int64_t> axis) {
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

// The same as a value that a GPU kernel can take, fastest dimension first.
struct Strides {
  static constexpr int kMost = 12;
  int count = 0;
  int64_t size[kMost] = {};
  int64_t stride[kInputs][kMost] = {};

  // False if there are too many dimensions.
  bool set(const std::vector<Dimension>& merged) {
    if (merged.size() > kMost) {
      return false;
    }
    for (auto dim = merged.rbegin(); dim != merged.rend(); ++dim, ++count) {
      size[count] = dim->size;
      stride[0][count] = dim->stride[0];
      stride[1][count] = dim->stride[1];
    }
    return true;
  }

  // Where the element at `position` of the output lies in an input.
  DFQ_HOST_DEVICE int64_t offset(int input, int64_t position) const {
    int64_t found = 0;
    DFQ_ROLLED
    for (int d = 0; d < count; ++d) {
      const int64_t rest = quotient(position, size[d]);
      found += (position - rest * size[d]) * stride[input][d];
      position = rest;
    }
    return found;
  }
};

}  // namespace dfq

// A convolution as the product of two matrices: a row of the first is what the window of an output
// pixel holds, tap after tap and in each the channels of a group, in bytes. It is never stored.
#pragma once

#include <cstdint>

#include "core/index.h"

namespace dfq {

// value / divisor, of what is below 2^20, as a product.
struct Divider {
  static constexpr int kMost = 1 << 20;
  uint64_t inverse = 0;

  Divider() = default;
  explicit Divider(int32_t divisor) : inverse((uint64_t{1} << 40) / divisor + 1) {}

  DFQ_HOST_DEVICE int32_t operator()(int32_t value) const {
    return static_cast<int32_t>(static_cast<uint32_t>(value) * inverse >> 40);
  }
};

// Images lie as [batch, height, width, channels]; pairs are along height and width.
struct Windows {
  int32_t height, width;  // of the images
  int32_t out_height, out_width;
  int32_t kernel_width;
  int32_t stride[2], padding[2], dilation[2];
  int32_t pixel_bytes;  // of all channels
  int32_t tap_bytes;    // of those of a group
  Divider by_tap, by_kernel_width;

  // The first tap of a window, which may be outside; `offset` is that of its pixel in the images.
  struct Corner {
    int64_t offset;
    int32_t row, column;
  };
  DFQ_HOST_DEVICE Corner corner(int64_t row) const {
    const int64_t line = quotient(row, out_width), image = quotient(line, out_height);
    const auto out_column = static_cast<int32_t>(row - line * out_width);
    const auto out_row = static_cast<int32_t>(line - image * out_height);
    const int32_t at_row = out_row * stride[0] - padding[0];
    const int32_t at_column = out_column * stride[1] - padding[1];
    return {((image * height + at_row) * width + at_column) * pixel_bytes, at_row, at_column};
  }
  // Of what is no row at all: none of its taps is inside.
  DFQ_HOST_DEVICE static Corner nowhere() { return {0, INT32_MIN / 2, INT32_MIN / 2}; }

  // From the corner to byte `k` of the row.
  struct Step {
    int64_t offset;
    int32_t row, column;
  };
  DFQ_HOST_DEVICE Step step(int32_t k) const {
    const int32_t tap = by_tap(k), tap_row = by_kernel_width(tap);
    const int32_t down = tap_row * dilation[0];
    const int32_t right = (tap - tap_row * kernel_width) * dilation[1];
    const int64_t pixels = static_cast<int64_t>(down) * width + right;
    return {pixels * pixel_bytes + (k - tap * tap_bytes), down, right};
  }

  DFQ_HOST_DEVICE bool inside(const Corner& corner, const Step& step) const {
    return static_cast<uint32_t>(corner.row + step.row) < static_cast<uint32_t>(height) &&
           static_cast<uint32_t>(corner.column + step.column) < static_cast<uint32_t>(width);
  }
};

}  // namespace dfq

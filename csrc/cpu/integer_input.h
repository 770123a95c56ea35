// What of its input an integer convolution reads at once: a copy without borders and signs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common.h"
#include "integer_weights.h"

namespace dfq {

// Sizes along height (0) and width (1).
struct Convolution {
  int64_t batch, size[2], channels;  // of x
  Filter filter;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int32_t x_zero;

  int64_t out_size(int d) const {
    return (size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  }
  int64_t pixels() const { return batch * out_size(0) * out_size(1); }
};

constexpr int64_t kSlack = 64;  // that may be read behind it

// x + 128 as uint8.
struct CopyShifted {
  template <int W>
  static DFQ_INLINE void run(const int8_t* from, int64_t n, uint8_t* to) {
    for (int64_t i = 0; i < n; ++i) {
      to[i] = static_cast<uint8_t>(from[i]) ^ 0x80;
    }
  }
};

// Images, or rows of one image: output pixels that are neighbours in memory.
struct Unit {
  int64_t image, images, row, rows;
};

// What of the input a unit's buffer holds. Without a window in a direction there are only the
// pixels that are used: the stride is taken when they are copied.
class Buffer {
 public:
  explicit Buffer(const Convolution& shape) : shape_(shape) {
    for (int d = 0; d < 2; ++d) {
      step_[d] = shape.kernel[d] == 1 ? shape.stride[d] : 1;
      stride_[d] = shape.stride[d] / step_[d];
    }
    columns_ = needed(1, shape.out_size(1));
  }

  int64_t needed(int d, int64_t outputs) const {
    return (outputs - 1) * stride_[d] + (shape_.kernel[d] - 1) * shape_.dilation[d] + 1;
  }
  int64_t row_bytes() const { return columns_ * shape_.channels; }
  int64_t bytes(const Unit& unit) const {
    return unit.images * needed(0, unit.rows) * row_bytes() + kSlack;
  }

  // Where the windows of a unit's output pixels begin. Of a smaller unit it is a part, from the
  // first.
  std::vector<int32_t> pixels(const Unit& unit) const {
    std::vector<int32_t> offsets(unit.images * unit.rows * shape_.out_size(1));
    int32_t* to = offsets.data();
    const int64_t step = stride_[1] * shape_.channels, width = shape_.out_size(1);
    for (int64_t image = 0; image < unit.images; ++image) {
      for (int64_t row = 0; row < unit.rows; ++row) {
        const int64_t first = (image * needed(0, unit.rows) + row * stride_[0]) * row_bytes();
        for (int64_t column = 0; column < width; ++column) {
          *to++ = static_cast<int32_t>(first + column * step);
        }
      }
    }
    return offsets;
  }

  // Where in a window the runs of K begin, for the first group.
  std::vector<int64_t> runs() const {
    std::vector<int64_t> offsets;
    for (int64_t r = 0; r < shape_.kernel[0]; ++r) {
      const int64_t row = r * shape_.dilation[0] * row_bytes();
      const int64_t columns = shape_.filter.whole_rows() ? 1 : shape_.kernel[1];
      for (int64_t s = 0; s < columns; ++s) {
        offsets.push_back(row + s * shape_.dilation[1] * shape_.channels);
      }
    }
    return offsets;
  }

  void fill(const int8_t* x, const Unit& unit, uint8_t* to) const {
    const int64_t rows = needed(0, unit.rows), image_bytes = shape_.size[1] * shape_.channels;
    for (int64_t image = unit.image; image < unit.image + unit.images; ++image) {
      for (int64_t row = 0; row < rows; ++row, to += row_bytes()) {
        const int64_t from = unit.row * shape_.stride[0] + row * step_[0] - shape_.padding[0];
        if (from < 0 || from >= shape_.size[0]) {
          std::fill_n(to, row_bytes(), zero());
        } else {
          fill_row(x + (image * shape_.size[0] + from) * image_bytes, to);
        }
      }
    }
    std::fill_n(to, kSlack, uint8_t{0});
  }

 private:
  uint8_t zero() const { return static_cast<uint8_t>(shape_.x_zero + 128); }

  void fill_row(const int8_t* x, uint8_t* to) const {
    const int64_t width = shape_.size[1], channels = shape_.channels, left = shape_.padding[1];
    const auto clip = [&](int64_t column) { return std::clamp<int64_t>(column, 0, columns_); };
    const int64_t begin = clip(ceil_div(left, step_[1]));
    const int64_t end = std::max(begin, clip(ceil_div(left + width, step_[1])));
    std::fill_n(to, begin * channels, zero());
    if (step_[1] == 1) {
      run<CopyShifted>(x + (begin - left) * channels, (end - begin) * channels,
                       to + begin * channels);
    } else {
      for (int64_t column = begin; column < end; ++column) {
        run<CopyShifted>(x + (column * step_[1] - left) * channels, channels,
                         to + column * channels);
      }
    }
    std::fill_n(to + end * channels, (columns_ - end) * channels, zero());
  }

  const Convolution& shape_;
  int64_t step_[2], stride_[2], columns_;
};

}  // namespace dfq

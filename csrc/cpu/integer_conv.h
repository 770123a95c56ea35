// An integer convolution that is not depthwise: units of output pixels, whose input is copied into
// a buffer that stays in the L2 cache, and panels of output channels.
//
// The buffer holds the input plus 128 as uint8, and the padding too. So the inner loops know
// neither borders nor signs: window and pixel are offsets into it. What the 128 and the zero of x
// add to a channel's sum is the sum of its weights times a number, from which its sums begin.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "common.h"
#include "integer_tiles.h"

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

// Everything of one call that all threads share.
struct Job {
  const Convolution& shape;
  const WeightLayout& weights;
  const int8_t* x;          // [batch, height, width, channels]
  const int8_t* prepacked;  // as `weights` says
  const int32_t* start;     // sixteen for each block
  Output output;
};

constexpr int64_t kBufferBytes = 192 << 10;  // of a unit's input
constexpr int64_t kSlack = 64;               // that may be read behind it

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

  // Where the windows of the unit's output pixels begin.
  std::vector<int64_t> pixels(const Unit& unit) const {
    std::vector<int64_t> offsets;
    offsets.reserve(unit.images * unit.rows * shape_.out_size(1));
    for (int64_t image = 0; image < unit.images; ++image) {
      for (int64_t row = 0; row < unit.rows; ++row) {
        const int64_t first = image * needed(0, unit.rows) + row * stride_[0];
        for (int64_t column = 0; column < shape_.out_size(1); ++column) {
          offsets.push_back(first * row_bytes() + column * stride_[1] * shape_.channels);
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

// How a convolution is cut: by the shape and the number of threads; no result depends on it.
class Cut {
 public:
  Cut(const Convolution& shape, const Buffer& buffer, int64_t panels) : shape_(shape) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = threads == 1 ? 1 : 2 * threads;
    const int64_t height = shape.out_size(0);
    const int64_t most = std::max<int64_t>(1, shape.batch / std::min(wanted, shape.batch));
    images_ = std::clamp<int64_t>(kBufferBytes / buffer.bytes({0, 1, 0, height}), 1, most);
    rows_ = height;
    const int64_t parts = std::clamp<int64_t>(ceil_div(wanted, shape.batch), 1, height);
    rows_ = ceil_div(height, parts);
    while (rows_ > 1 && buffer.bytes({0, 1, 0, rows_}) > kBufferBytes) {
      rows_ = ceil_div(rows_, 2);
    }
    splits_ = std::clamp<int64_t>(ceil_div(wanted, units()), 1, panels);
  }

  int64_t units() const {
    return ceil_div(shape_.batch, images_) * ceil_div(shape_.out_size(0), rows_);
  }
  int64_t chunks() const { return units() * splits_; }
  int64_t splits() const { return splits_; }  // of the panels
  Unit unit(int64_t index) const {
    const int64_t per_image = ceil_div(shape_.out_size(0), rows_);
    const int64_t image = index / per_image * images_, row = index % per_image * rows_;
    return {image, std::min(images_, shape_.batch - image), row,
            std::min(rows_, shape_.out_size(0) - row)};
  }

 private:
  const Convolution& shape_;
  int64_t images_, rows_, splits_;
};

// The panels [begin, end) of one unit.
class UnitWork {
 public:
  UnitWork(const Job& job, const Buffer& buffer, const Unit& unit)
      : job_(job),
        filter_(job.weights.filter),
        input_(new uint8_t[buffer.bytes(unit)]),
        pixels_(buffer.pixels(unit)),
        runs_(buffer.runs()),
        first_pixel_((unit.image * job.shape.out_size(0) + unit.row) * job.shape.out_size(1)) {
    buffer.fill(job.x, unit, input_.get());
    if (job.weights.packed) {
      unpacked_.reset(new int8_t[kMostBlocks * unpacked_bytes()]);
    }
  }

  static int64_t panels(const Filter& filter) {
    return filter.groups * ceil_div(filter.group_blocks(), kMostBlocks);
  }

  void convolve(int64_t panel) {
    const int64_t in_group = ceil_div(filter_.group_blocks(), kMostBlocks);
    const int64_t group = panel / in_group, first = panel % in_group * kMostBlocks;
    const Reading in = reading(group);
    if (job_.output.weight_zero && group != summed_group_) {
      sum_windows(in);
      summed_group_ = group;
    }
    Panel blocks{std::min<int64_t>(kMostBlocks, filter_.group_blocks() - first), {}, {}};
    const int64_t block = group * filter_.group_blocks() + first;
    for (int64_t b = 0; b < blocks.blocks; ++b) {
      blocks.weights[b] = block_weights(block + b, b);
      blocks.start[b] = job_.start + (block + b) * kLanes;
    }
    const Writing out{&job_.output,
                      job_.output.weight_zero ? window_sums_.data() : nullptr,
                      first_pixel_,
                      filter_.out,
                      block,
                      group * filter_.group_out() + first * kLanes,
                      filter_.group_out() - first * kLanes};
    run_dot<ConvolvePanel>(&in, &blocks, &out);
  }

 private:
  int64_t unpacked_bytes() const { return (filter_.words() + 1) * kWordBytes; }

  Reading reading(int64_t group) const {
    return {input_.get() + group * filter_.in,    pixels_.data(),
            static_cast<int64_t>(pixels_.size()), runs_.data(),
            static_cast<int64_t>(runs_.size()),   filter_.run_words()};
  }

  const int8_t* block_weights(int64_t block, int64_t place) {
    const int8_t* from = job_.prepacked + block * job_.weights.block_bytes();
    if (!job_.weights.packed) {
      return from;
    }
    int8_t* to = unpacked_.get() + place * unpacked_bytes();
    run<UnpackBlock>(from, job_.weights.block_bytes(), to);
    return to;
  }

  void sum_windows(const Reading& in) {
    const auto ones = ones_block(filter_);
    const int32_t none[kLanes] = {};
    const Panel panel{1, {ones.data()}, {none}};
    const auto of_zeros = static_cast<int32_t>(filter_.elements() * (128 + job_.shape.x_zero));
    window_sums_.resize(in.pixel_count);
    run_dot<SumWindows>(&in, &panel, of_zeros, window_sums_.data());
  }

  const Job& job_;
  const Filter& filter_;
  const std::unique_ptr<uint8_t[]> input_;
  std::unique_ptr<int8_t[]> unpacked_;
  const std::vector<int64_t> pixels_, runs_;
  const int64_t first_pixel_;
  std::vector<int32_t> window_sums_;
  int64_t summed_group_ = -1;
};

inline void convolve(const Job& job) {
  const Buffer buffer(job.shape);
  const int64_t panels = UnitWork::panels(job.weights.filter);
  const Cut cut(job.shape, buffer, panels);
  for_each_chunk(cut.chunks(), [&](int64_t chunk) {
    const int64_t split = chunk % cut.splits();
    UnitWork work(job, buffer, cut.unit(chunk / cut.splits()));
    for (int64_t panel = panels * split / cut.splits(); panel < panels * (split + 1) / cut.splits();
         ++panel) {
      work.convolve(panel);
    }
  });
}

}  // namespace dfq

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
#include <type_traits>
#include <vector>

#include "common.h"
#include "integer_input.h"
#include "integer_tiles.h"

namespace dfq {

// Everything of one call that all threads share.
struct Job {
  const Convolution& shape;
  const WeightLayout& weights;
  const int8_t* x;          // [batch, height, width, channels]
  const int8_t* prepacked;  // as `weights` says
  const int32_t* start;     // sixteen for each block
  Output output;
};

// A unit has kUnitBytes of input, or kUnitPixels where that is more: the input stays in the L2
// cache, and reading the weights anew costs little beside what is done with them.
constexpr int64_t kUnitBytes = 64 << 10, kUnitPixels = 512;

// How a convolution is cut: by the shape and the number of threads; no result depends on it.
class Cut {
 public:
  Cut(const Convolution& shape, const Buffer& buffer, int64_t panels) : shape_(shape) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = threads == 1 ? 1 : 2 * threads;
    const int64_t height = shape.out_size(0);
    const int64_t width = shape.out_size(1);
    const auto fits = [&](int64_t images, int64_t rows) {
      return images * rows * width <= kUnitPixels ||
             buffer.bytes({0, images, 0, rows}) <= kUnitBytes;
    };
    rows_ = ceil_div(height, std::clamp<int64_t>(ceil_div(wanted, shape.batch), 1, height));
    while (rows_ > 1 && !fits(1, rows_)) {
      rows_ = ceil_div(rows_, 2);
    }
    const int64_t most = rows_ < height ? 1 : std::max<int64_t>(1, shape.batch / wanted);
    images_ = 1;
    while (images_ < most && fits(images_ + 1, rows_)) {
      ++images_;
    }
    splits_ = std::clamp<int64_t>(ceil_div(wanted, units()), 1, panels);
  }

  int64_t units() const {
    return ceil_div(shape_.batch, images_) * ceil_div(shape_.out_size(0), rows_);
  }
  int64_t chunks() const { return units() * splits_; }
  int64_t splits() const { return splits_; }  // of the panels
  Unit largest() const { return {0, images_, 0, rows_}; }
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
  UnitWork(const Job& job, const Buffer& buffer, const std::vector<int32_t>& pixels,
           const std::vector<int64_t>& runs, const Unit& unit)
      : job_(job),
        filter_(job.weights.filter),
        input_(new uint8_t[buffer.bytes(unit)]),
        pixels_(pixels),
        runs_(runs),
        pixel_count_(unit.images * unit.rows * job.shape.out_size(1)),
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
    with_output(job_.output, [&](auto residual, auto* to) {
      using T = std::remove_pointer_t<decltype(to)>;
      constexpr bool kResidual = decltype(residual)::value;
      blocks.blocks == 2 ? run_dot<ConvolvePanel<2, T, kResidual>>(&in, &blocks, &out, to)
                         : run_dot<ConvolvePanel<1, T, kResidual>>(&in, &blocks, &out, to);
    });
  }

 private:
  int64_t unpacked_bytes() const { return (filter_.words() + 1) * kWordBytes; }

  Reading reading(int64_t group) const {
    return {input_.get() + group * filter_.in,  pixels_.data(),     pixel_count_, runs_.data(),
            static_cast<int64_t>(runs_.size()), filter_.run_words()};
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
  const std::vector<int32_t>& pixels_;
  const std::vector<int64_t>& runs_;
  const int64_t pixel_count_, first_pixel_;
  std::vector<int32_t> window_sums_;
  int64_t summed_group_ = -1;
};

inline void convolve(const Job& job) {
  const Buffer buffer(job.shape);
  const int64_t panels = UnitWork::panels(job.weights.filter);
  const Cut cut(job.shape, buffer, panels);
  STD_TORCH_CHECK(buffer.bytes(cut.largest()) < int64_t{1} << 31, "one row of x takes too much");
  const auto pixels = buffer.pixels(cut.largest());
  const auto runs = buffer.runs();
  for_each_chunk(cut.chunks(), [&](int64_t chunk) {
    const int64_t split = chunk % cut.splits();
    UnitWork work(job, buffer, pixels, runs, cut.unit(chunk / cut.splits()));
    for (int64_t panel = panels * split / cut.splits(); panel < panels * (split + 1) / cut.splits();
         ++panel) {
      work.convolve(panel);
    }
  });
}

}  // namespace dfq

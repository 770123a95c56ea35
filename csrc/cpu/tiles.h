// Tensors of one shape [B, C, ...] and any strides, cut into tiles that stay in the L1 cache.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <utility>
#include <vector>

#include "common.h"

namespace dfq {

constexpr int64_t kMaxTile = 8192;     // elements of a tile
constexpr int64_t kMaxRun = 4096;      // elements of one channel's run in a tile
constexpr int64_t kShortRun = 512;     // shorter runs share a tile, twice this together
constexpr int64_t kMaxChannels = 128;  // channels of a tile
constexpr int64_t kMaxWidth = 256;     // elements of several rows that are walked as one

// Elements of a buffer for a tile that does not lie in rows; begins kLanes in, where a row that is
// shorter than a vector may be read from.
constexpr int64_t kBuffer = kLanes + kMaxTile + kMaxWidth;

// The elements [start, start + length) of some rows. A row is a run of one channel or, where the
// channel is the innermost dimension, the channels of one position.
struct Tile {
  int64_t group;  // the tiles of a group hold different channels
  int64_t channel, channels;
  int64_t row, rows, start, length;

  // The same elements as `lines` of `width`, the last of `last`: short rows are joined.
  int64_t lines, width, last;

  int64_t per_channel() const { return rows * length / channels; }
};

template <class T>
struct Lines {
  T* data;
  int64_t pitch;

  DFQ_INLINE T* at(int64_t line, int64_t i) const { return data + line * pitch + i; }
};

// How tensors of one shape are cut: by the shape, and the strides of the first, alone.
class Tiling {
 public:
  static constexpr int kTensors = 3;

  explicit Tiling(std::initializer_list<Tensor> tensors) {
    const Tensor& first = *tensors.begin();
    for (int64_t d = 0; d < first.dim(); ++d) {
      Dim dim;
      dim.size = first.size(d);
      int i = 0;
      for (const Tensor& tensor : tensors) {
        dim.stride[i++] = tensor.stride(d);
      }
      if (d == 1) {
        channel_ = dim;
      } else if (dim.size != 1) {
        outer_.push_back(dim);
        count_ *= dim.size;
      }
    }
    join_dims();
    interleaved_ = channel_.size > 1 && channel_.stride[0] == 1;
    if (interleaved_) {
      cut_interleaved();
    } else {
      cut_planes();
    }
  }

  bool interleaved() const { return interleaved_; }  // a row holds several channels
  int64_t channels() const { return channel_.size; }
  int64_t count() const { return count_; }  // elements of one channel
  int64_t groups() const { return row_groups_ * (interleaved_ ? 1 : pieces_); }
  int64_t tiles() const { return row_groups_ * pieces_ * (interleaved_ ? 1 : channels()); }

  // Elements of one channel in each tile of a group.
  int64_t count(int64_t group) const {
    const int64_t row_group = interleaved_ ? group : group / pieces_;
    const int64_t rows = std::min(rows_, row_count_ - row_group * rows_);
    return interleaved_ ? rows : rows * std::min(piece_, row_.size - group % pieces_ * piece_);
  }

  Tile tile(int64_t index) const {
    Tile t;
    const int64_t piece = index % pieces_;
    const int64_t before = index / pieces_;
    const int64_t row_group = interleaved_ ? before : before / channels();
    t.row = row_group * rows_;
    t.rows = std::min(rows_, row_count_ - t.row);
    t.start = piece * piece_;
    t.length = std::min(piece_, row_.size - t.start);
    t.group = interleaved_ ? row_group : row_group * pieces_ + piece;
    t.channel = interleaved_ ? t.start : before % channels();
    t.channels = interleaved_ ? t.length : 1;
    t.width = joined_width(t.rows, t.length);
    t.lines = ceil_div(t.rows * t.length, t.width);
    t.last = t.rows * t.length - (t.lines - 1) * t.width;
    return t;
  }

  // The tile's lines: where they lie, else copied to the buffer.
  template <class T>
  Lines<const T> gather(int tensor, const Tile& t, const T* data, T* buffer) const {
    if (in_place(tensor, t)) {
      return {data + offset(tensor, t, 0), pitch(tensor, t)};
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      const T* from = data + offset(tensor, t, r);
      T* to = buffer + kLanes + r * t.length;
      if (row_.stride[tensor] == 1) {
        std::memcpy(to, from, t.length * sizeof(T));
      } else {
        for (int64_t i = 0; i < t.length; ++i) {
          to[i] = from[i * row_.stride[tensor]];
        }
      }
    }
    return {buffer + kLanes, t.width};
  }

  // Where to write the tile's lines; scatter() brings them home.
  template <class T>
  Lines<T> target(int tensor, const Tile& t, T* data, T* buffer) const {
    if (in_place(tensor, t)) {
      return {data + offset(tensor, t, 0), pitch(tensor, t)};
    }
    return {buffer + kLanes, t.width};
  }
  template <class T>
  void scatter(int tensor, const Tile& t, const T* buffer, T* data) const {
    if (in_place(tensor, t)) {
      return;
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      const T* from = buffer + kLanes + r * t.length;
      T* to = data + offset(tensor, t, r);
      if (row_.stride[tensor] == 1) {
        std::memcpy(to, from, t.length * sizeof(T));
      } else {
        for (int64_t i = 0; i < t.length; ++i) {
          to[i * row_.stride[tensor]] = from[i];
        }
      }
    }
  }

 private:
  struct Dim {
    int64_t size = 1;
    int64_t stride[kTensors] = {};
  };

  // Dimensions that every tensor walks as one become one.
  void join_dims() {
    std::stable_sort(outer_.begin(), outer_.end(),
                     [](const Dim& a, const Dim& b) { return a.stride[0] > b.stride[0]; });
    std::vector<Dim> joined;
    for (const Dim& inner : outer_) {
      bool joins = !joined.empty();
      for (int i = 0; joins && i < kTensors; ++i) {
        joins = joined.back().stride[i] == inner.stride[i] * inner.size;
      }
      if (joins) {
        joined.back().size *= inner.size;
        std::copy(inner.stride, inner.stride + kTensors, joined.back().stride);
      } else {
        joined.push_back(inner);
      }
    }
    outer_ = std::move(joined);
  }

  void cut_planes() {
    if (!outer_.empty()) {
      row_ = outer_.back();
      outer_.pop_back();
    }
    row_count_ = row_.size == 0 ? 0 : count_ / row_.size;
    piece_ = std::max<int64_t>(1, std::min(row_.size, kMaxRun));
    rows_ = piece_ < kShortRun ? 2 * kShortRun / piece_ : 1;
    pieces_ = ceil_div(row_.size, piece_);
    row_groups_ = ceil_div(row_count_, rows_);
  }

  void cut_interleaved() {
    row_ = channel_;
    row_count_ = count_;
    pieces_ = ceil_div(row_.size, kMaxChannels);
    piece_ = std::min(row_.size, ceil_div(ceil_div(row_.size, pieces_), kLanes) * kLanes);
    pieces_ = ceil_div(row_.size, piece_);
    const int64_t joined = joined_width(kMaxTile, piece_) / piece_;
    rows_ = kMaxTile / piece_ / joined * joined;
    row_groups_ = ceil_div(row_count_, rows_);
  }

  // Whole rows of several channels are joined until they fill vectors, and enough of them to keep
  // some sums apart; others only if they are shorter than a vector.
  int64_t joined_width(int64_t rows, int64_t length) const {
    if (!interleaved_) {
      return length < kLanes ? rows * length : length;
    }
    int64_t width = std::lcm(length, int64_t{kLanes});
    while (width < 4 * kLanes) {
      width *= 2;
    }
    const int64_t short_length = pieces_ == 1 ? 4 * kLanes : int64_t{kLanes};
    return length < short_length && width <= kMaxWidth ? width : length;
  }

  int64_t pitch(int tensor, const Tile& t) const {
    return t.width != t.length || outer_.empty() ? t.width : outer_[0].stride[tensor];
  }

  bool in_place(int tensor, const Tile& t) const {
    if (row_.stride[tensor] != 1 || t.width < kLanes || (t.rows > 1 && outer_.size() != 1)) {
      return false;
    }
    const bool joined = t.width != t.length;
    return !joined || (t.last == t.width && outer_[0].stride[tensor] == t.length);
  }

  // Where row r of the tile begins in the tensor.
  int64_t offset(int tensor, const Tile& t, int64_t r) const {
    int64_t at = t.start * row_.stride[tensor];
    if (!interleaved_) {
      at += t.channel * channel_.stride[tensor];
    }
    int64_t index = t.row + r;
    for (size_t d = outer_.size(); d-- > 1; index /= outer_[d].size) {
      at += index % outer_[d].size * outer_[d].stride[tensor];
    }
    return outer_.empty() ? at : at + index * outer_[0].stride[tensor];
  }

  std::vector<Dim> outer_;  // the dimensions that number the rows, outermost first
  Dim channel_, row_;
  bool interleaved_ = false;
  int64_t count_ = 1, row_count_ = 0;
  int64_t piece_ = 1, pieces_ = 0, rows_ = 1, row_groups_ = 0;  // of a row; of rows
};

}  // namespace dfq

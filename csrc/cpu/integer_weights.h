// The weights of an integer convolution in the order in which the CPU kernels read them.
//
// Output channels go by sixteen ("a block"), and for every four neighbours along K ("a word") a
// block has 64 bytes: four for each of its channels. What there is no weight for is 0. With 4-bit
// weights 64 bytes hold two words, the second in the upper halves of the bytes. Behind the blocks
// stand the sums of the weights of each channel, int32.
//
// K is read in runs of neighbours in memory: a whole row of the filter where its pixels are
// neighbours and all channels are read, otherwise the channels of one pixel. A depthwise filter's
// runs are four pixels of a row, of one channel each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "common.h"
#include "core/nibbles.h"
#include "packed_channels.h"

namespace dfq {

struct Filter {
  int64_t out, height, width, in;  // [O, kh, kw, I], as the weights are stored
  int64_t groups;
  int64_t dilation_width;

  int64_t elements() const { return height * width * in; }
  bool depthwise() const { return groups > 1 && in == 1 && out == groups; }
  bool whole_rows() const { return groups == 1 && dilation_width == 1; }

  // A depthwise filter is one group of `out` channels here.
  int64_t block_groups() const { return depthwise() ? 1 : groups; }
  int64_t group_out() const { return out / block_groups(); }
  int64_t group_blocks() const { return ceil_div(group_out(), kLanes); }
  int64_t blocks() const { return block_groups() * group_blocks(); }

  int64_t quads() const { return ceil_div(width, 4); }  // of a row of a depthwise filter
  int64_t runs() const {
    return depthwise() ? height * quads() : whole_rows() ? height : height * width;
  }
  int64_t run_bytes() const { return depthwise() ? 4 : whole_rows() ? width * in : in; }
  int64_t run_words() const { return ceil_div(run_bytes(), 4); }
  int64_t words() const { return runs() * run_words(); }

  // Whether byte `at` of a run is a weight; *k becomes its place in [kh, kw, I].
  bool place(int64_t run, int64_t at, int64_t* k) const {
    if (depthwise()) {
      const int64_t column = run % quads() * 4 + at;
      *k = run / quads() * width + column;
      return column < width;
    }
    *k = run * run_bytes() + at;
    return at < run_bytes();
  }
};

constexpr int64_t kWordBytes = 4 * kLanes;

// Where everything lies in the bytes that prepack() makes.
struct WeightLayout {
  Filter filter;
  bool packed;  // 4-bit weights, two words in 64 bytes

  WeightLayout(const Filter& filter, bool four_bits)
      : filter(filter), packed(four_bits && !filter.depthwise()) {}
  int64_t block_bytes() const {
    return (packed ? ceil_div(filter.words(), 2) : filter.words()) * kWordBytes;
  }
  int64_t sums_at() const { return filter.blocks() * block_bytes(); }
  int64_t bytes() const { return sums_at() + filter.blocks() * kLanes * 4; }
  const int32_t* sums(const int8_t* prepacked) const {
    return reinterpret_cast<const int32_t*>(prepacked + sums_at());
  }
};

// Weights as they are stored in files: int8, or rows of 4-bit ones (core/nibbles.h).
struct StoredWeights {
  const Tensor& tensor;
  bool four_bits;
  int64_t row_elements;

  // A row as int8; `buffer` has room for it where it must be unpacked.
  const int8_t* row(int64_t index, std::vector<int8_t>& buffer) const {
    if (!four_bits) {
      return data<int8_t>(tensor) + index * row_elements;
    }
    const int64_t bytes = packed_size(row_elements);
    buffer.resize(2 * bytes);
    run<UnpackChannels>(data<uint8_t>(tensor) + index * bytes, bytes / kHalfBlock, buffer.data());
    return buffer.data();
  }
};

// One channel's bytes of each word; `to` is where its first word begins.
inline void place_row(const Filter& filter, const int8_t* from, int8_t* to) {
  if (filter.depthwise()) {
    for (int64_t run = 0; run < filter.runs(); ++run) {
      for (int64_t at = 0; at < 4; ++at) {
        int64_t k;
        if (filter.place(run, at, &k)) {
          to[run * kWordBytes + at] = from[k];
        }
      }
    }
    return;
  }
  const int64_t whole = filter.run_bytes() / 4, rest = filter.run_bytes() % 4;
  for (int64_t run = 0; run < filter.runs(); ++run) {
    for (int64_t word = 0; word < whole; ++word, from += 4, to += kWordBytes) {
      std::memcpy(to, from, 4);
    }
    if (rest) {
      std::memcpy(to, from, rest);
      from += rest;
      to += kWordBytes;
    }
  }
}

// The 64 bytes of each word of one block; returns through `sums` those of its channels.
inline void prepack_block(const Filter& filter, const StoredWeights& weights, int64_t block,
                          std::vector<int8_t>& words, int32_t* sums) {
  std::fill(words.begin(), words.end(), int8_t{0});
  const int64_t group = block / filter.group_blocks();
  const int64_t first = block % filter.group_blocks() * kLanes;
  const int64_t channels = std::min<int64_t>(kLanes, filter.group_out() - first);
  std::vector<int8_t> buffer;
  for (int64_t c = 0; c < channels; ++c) {
    const int8_t* row = weights.row(group * filter.group_out() + first + c, buffer);
    place_row(filter, row, words.data() + 4 * c);
    sums[c] = std::accumulate(row, row + filter.elements(), int32_t{0});
  }
}

// Two words in 64 bytes.
struct PackBlock {
  template <int W>
  static DFQ_INLINE void run(const int8_t* from, int64_t bytes, int8_t* to) {
    for (int64_t i = 0; i < bytes; i += kWordBytes, from += 2 * kWordBytes) {
      for (int64_t j = 0; j < kWordBytes; ++j) {
        to[i + j] = static_cast<int8_t>(pack_nibbles(from[j], from[kWordBytes + j]));
      }
    }
  }
};

inline void prepack(const WeightLayout& layout, const StoredWeights& weights, int8_t* out) {
  const Filter& filter = layout.filter;
  int32_t* sums = reinterpret_cast<int32_t*>(out + layout.sums_at());
  std::fill_n(sums, filter.blocks() * kLanes, 0);
  for_each_chunk(filter.blocks(), [&](int64_t block) {
    std::vector<int8_t> words((filter.words() + 1) * kWordBytes);
    prepack_block(filter, weights, block, words, sums + block * kLanes);
    int8_t* to = out + block * layout.block_bytes();
    if (layout.packed) {
      run<PackBlock>(words.data(), layout.block_bytes(), to);
    } else {
      std::copy_n(words.begin(), layout.block_bytes(), to);
    }
  });
}

// The words of a packed block as int8, two for every 64 bytes.
struct UnpackBlock {
  template <int W>
  static DFQ_INLINE void run(const int8_t* from, int64_t bytes, int8_t* to) {
    for (int64_t i = 0; i < bytes; i += kWordBytes, to += 2 * kWordBytes) {
      for (int64_t j = 0; j < kWordBytes; ++j) {
        const uint8_t byte = static_cast<uint8_t>(from[i + j]);
        to[j] = static_cast<int8_t>(((byte & 15) ^ 8) - 8);
        to[kWordBytes + j] = static_cast<int8_t>(((byte >> 4) ^ 8) - 8);
      }
    }
  }
};

// One word for each of all words of a block with 1 where there is a weight: a channel's sum with
// them is the sum of what it reads.
inline std::vector<int8_t> ones_block(const Filter& filter) {
  std::vector<int8_t> words(filter.words() * kWordBytes);
  for (int64_t i = 0; i < filter.words() * kWordBytes; ++i) {
    const int64_t word = i / kWordBytes;
    int64_t k;
    const int64_t at = word % filter.run_words() * 4 + i % 4;
    words[i] = filter.place(word / filter.run_words(), at, &k);
  }
  return words;
}

}  // namespace dfq

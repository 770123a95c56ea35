// Depthwise convolutions. A thread has four neighbouring channels of a column of outputs, and goes
// down: each row of the input is loaded once, and brought into words of four neighbours along the
// width, one for each channel, as a dot product of four bytes wants them.
// The specification is dfq_kernels/qconv2d.py; outputs are equal to it, bit for bit.
#include <algorithm>

#include "bytes.h"
#include "core/fragments.h"
#include "core/nibbles.h"
#include "depthwise.h"
#include "integer_output.h"

namespace dfq {
namespace {

constexpr int kThreads = 128;
constexpr int kMostLogFours = 5;   // of channels in a block: a line of 128 bytes
constexpr int32_t kMostRows = 16;  // of outputs, of a thread
#if defined(DFQ_EMULATE_CUDA)
constexpr int64_t kEnough = 64;  // small layers go the way of large ones
#else
constexpr int64_t kEnough = 1 << 18;  // threads, to keep every GPU busy
#endif

// What a thread of a block takes.
struct Columns {
  int log_fours;      // of a block
  int64_t across;     // blocks along the channels
  int32_t rows;       // outputs of a thread
  int32_t strips;     // such pieces of a column
  int64_t positions;  // strips of all columns of all images

  int64_t blocks() const {
    const int64_t positions_of_block = kThreads >> log_fours;
    return across * ((positions + positions_of_block - 1) / positions_of_block);
  }
};

DFQ_DEVICE int8_t weight_of(const IntegerLayer& layer, int64_t channel, int32_t tap) {
  const uint8_t* row = layer.weight + channel * layer.weight_row_bytes;
  return layer.weight_packed ? unpack_nibble(row[packed_byte(tap)], packed_in_upper(tap))
                             : static_cast<int8_t>(row[tap]);
}

// A filter of kSize x kSize for each of four channels, in words as the input is brought into.
template <int kSize>
struct Filters {
  static constexpr int kWords = (kSize + 3) / 4;  // of a row
  uint32_t word[kSize][kWords][kFour] = {};
  int32_t zero[kFour];
  int32_t correction[kFour];  // x_zero times the sum of the filter

  DFQ_DEVICE Filters(const IntegerLayer& layer, int64_t channel) {
#pragma unroll
    for (int c = 0; c < kFour; ++c) {
      int32_t sum = 0;
#pragma unroll
      for (int tap = 0; tap < kSize * kSize; ++tap) {
        const int8_t value = weight_of(layer, channel + c, tap);
        const int column = tap % kSize;
        word[tap / kSize][column / 4][c] |= static_cast<uint32_t>(static_cast<uint8_t>(value))
                                            << column % 4 * 8;
        sum += value;
      }
      zero[c] = layer.weight_zero.at(channel + c);
      correction[c] = layer.x_zero * (sum - kSize * kSize * zero[c]);
    }
  }

  // Ones in the place of the filter's row.
  static DFQ_DEVICE uint32_t ones(int word) {
    return kSize - 4 * word >= 4 ? 0x01010101u : 0x01010101u >> (4 - (kSize - 4 * word)) * 8;
  }
};

// The rows of the input that the window of an output sees, the last kSize that were pushed.
template <int kSize>
class Window {
 public:
  static constexpr int kWords = Filters<kSize>::kWords;

  // `x` points to the first column of the window in the image's row 0, which may be outside.
  DFQ_DEVICE Window(const IntegerLayer& layer, const uint8_t* x, int32_t row, int32_t column)
      : layer_(layer), x_(x), row_(row) {
    const Windows& windows = layer.windows;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const auto at = static_cast<uint32_t>(column + i * windows.dilation[1]);
      inside_ |= static_cast<uint32_t>(at < static_cast<uint32_t>(windows.width)) << i;
    }
    fetch();
  }

  // The row that was fetched comes in below, and the next one is asked for.
  DFQ_DEVICE void push() {
#pragma unroll
    for (int r = 0; r + 1 < kSize; ++r) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
#pragma unroll
        for (int c = 0; c < kFour; ++c) {
          rows_[r][w][c] = rows_[r + 1][w][c];
        }
      }
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint32_t words[kFour];
#pragma unroll
      for (int i = 0; i < kFour; ++i) {
        words[i] = 4 * w + i < kSize ? next_[4 * w + i] : 0;
      }
      transpose_bytes(words);
#pragma unroll
      for (int c = 0; c < kFour; ++c) {
        rows_[kSize - 1][w][c] = words[c];
      }
    }
    ++row_;
    fetch();
  }

  // Of channel c; without its corrections.
  DFQ_DEVICE int32_t sum(const Filters<kSize>& filters, int c) const {
    int32_t sum = 0;
#pragma unroll
    for (int r = 0; r < kSize; ++r) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        sum = dot_int8(rows_[r][w][c], filters.word[r][w][c], sum);
      }
    }
    return sum;
  }
  DFQ_DEVICE int32_t sum_of_inputs(int c) const {
    int32_t sum = 0;
#pragma unroll
    for (int r = 0; r < kSize; ++r) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        sum = dot_int8(rows_[r][w][c], Filters<kSize>::ones(w), sum);
      }
    }
    return sum;
  }

 private:
  DFQ_DEVICE void fetch() {
    const Windows& windows = layer_.windows;
    const bool there = static_cast<uint32_t>(row_) < static_cast<uint32_t>(windows.height);
    const uint32_t nothing = static_cast<uint8_t>(layer_.x_zero) * 0x01010101u;
    const uint8_t* from = x_ + static_cast<int64_t>(row_) * windows.width * windows.pixel_bytes;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const bool load = there && (inside_ >> i & 1u);
      const int64_t at = static_cast<int64_t>(i) * windows.dilation[1] * windows.pixel_bytes;
      next_[i] = load ? load_word(from + at) : nothing;
    }
  }

  const IntegerLayer& layer_;
  const uint8_t* x_;
  int32_t row_;          // that was fetched
  uint32_t inside_ = 0;  // a bit for each column of the window
  uint32_t next_[kSize];
  uint32_t rows_[kSize][kWords][kFour] = {};
};

template <int kSize>
__global__ void __launch_bounds__(kThreads)
    depthwise_columns(const IntegerLayer layer, const Columns columns) {
  const Windows& windows = layer.windows;
  const int64_t tile = quotient(blockIdx.x, columns.across);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t four = ((blockIdx.x - tile * columns.across) << columns.log_fours) +
                       (thread & ((1 << columns.log_fours) - 1));
  const int64_t position = tile * (kThreads >> columns.log_fours) + (thread >> columns.log_fours);
  if (four * kFour >= windows.pixel_bytes || position >= columns.positions) {
    return;
  }
  const int64_t strip = quotient(position, windows.out_width);
  const auto out_column = static_cast<int32_t>(position - strip * windows.out_width);
  const int64_t image = quotient(strip, columns.strips);
  const auto first = static_cast<int32_t>(strip - image * columns.strips) * columns.rows;
  const int32_t column = out_column * windows.stride[1] - windows.padding[1];
  const int32_t row = first * windows.stride[0] - windows.padding[0];
  const uint8_t* x = layer.x + four * kFour +
                     (image * windows.height * windows.width + column) * windows.pixel_bytes;
  // the rows that come with the first output, and before them those that it needs besides
  const int32_t before = kSize - windows.stride[0];
  Window<kSize> window(layer, x, row + (before < 0 ? before : 0), column);
  const Filters<kSize> filters(layer, four * kFour);
  const FourChannels outputs(layer, four * kFour, kFour, filters.correction);
  DFQ_ROLLED
  for (int32_t i = 0; i < before; ++i) {
    window.push();
  }
  int64_t out = (image * windows.out_height + first) * windows.out_width + out_column;
  const int32_t rest = windows.out_height - first;
  const int32_t rows = rest < columns.rows ? rest : columns.rows;
  DFQ_ROLLED
  for (int32_t i = 0; i < rows; ++i, out += windows.out_width) {
    DFQ_ROLLED
    for (int32_t step = 0; step < windows.stride[0]; ++step) {
      window.push();
    }
    int32_t sums[kFour];
#pragma unroll
    for (int c = 0; c < kFour; ++c) {
      sums[c] = window.sum(filters, c);
    }
    if (layer.weight_zero.values) {
#pragma unroll
      for (int c = 0; c < kFour; ++c) {
        sums[c] -= filters.zero[c] * window.sum_of_inputs(c);
      }
    }
    outputs.finish(out, sums, 0);
  }
}

// Of any size, strides and dilation, and any number of outputs of a channel: four channels of an
// output.
__global__ void __launch_bounds__(kThreads) depthwise_any(const IntegerLayer layer) {
  const Windows& windows = layer.windows;
  const int64_t fours = (layer.output.channels + kFour - 1) / kFour;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = quotient(index, fours), first = (index - row * fours) * kFour;
  if (row >= layer.output.rows) {
    return;
  }
  const Windows::Corner corner = windows.corner(row);
  const int64_t rest = layer.output.channels - first;
  const int count = rest < kFour ? static_cast<int>(rest) : kFour;
  int32_t sums[kFour] = {};
#pragma unroll
  for (int c = 0; c < kFour; ++c) {
    const int64_t channel = first + c;
    DFQ_ROLLED
    for (int32_t tap = 0; c < count && tap < layer.k; ++tap) {
      const int32_t v = tap / windows.kernel_width, u = tap - v * windows.kernel_width;
      const int32_t at_row = corner.row + v * windows.dilation[0];
      const int32_t at_column = corner.column + u * windows.dilation[1];
      if (static_cast<uint32_t>(at_row) < static_cast<uint32_t>(windows.height) &&
          static_cast<uint32_t>(at_column) < static_cast<uint32_t>(windows.width)) {
        const int64_t pixel =
            static_cast<int64_t>(v * windows.dilation[0]) * windows.width + u * windows.dilation[1];
        const int64_t at =
            corner.offset + pixel * windows.pixel_bytes + quotient(channel, layer.group_channels);
        const int32_t value = static_cast<int8_t>(layer.x[at]) - layer.x_zero;
        sums[c] += value * (weight_of(layer, channel, tap) - layer.weight_zero.at(channel));
      }
    }
  }
  const int32_t none[kFour] = {};
  FourChannels(layer, first, count, none).finish(row, sums, 0);
}

template <int kSize>
Failure launch_columns(const IntegerLayer& layer, void* stream) {
  const Windows& windows = layer.windows;
  const int64_t fours = windows.pixel_bytes / kFour;
  const int64_t lines = layer.output.rows / windows.out_height;  // columns of all images
  Columns columns{};
  while (columns.log_fours < kMostLogFours && (1 << columns.log_fours) < fours) {
    ++columns.log_fours;
  }
  columns.across = ((fours - 1) >> columns.log_fours) + 1;
  const auto strips_of = [&](int32_t rows) { return (windows.out_height + rows - 1) / rows; };
  columns.rows = std::min(kMostRows, windows.out_height);
  while (columns.rows > 1 && lines * strips_of(columns.rows) * fours < kEnough) {
    columns.rows = (columns.rows + 1) / 2;
  }
  columns.strips = strips_of(columns.rows);
  columns.positions = lines * columns.strips;
  return launch(&depthwise_columns<kSize>, columns.blocks(), kThreads, stream, layer, columns);
}

}  // namespace

Failure depthwise(const IntegerLayer& given, void* stream) {
  IntegerLayer layer = given;
  const Windows& windows = layer.windows;
  const auto aligned = [](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % kFour == 0;
  };
  layer.output.fours = layer.output.channels % kFour == 0 && aligned(layer.output.residual);
  if (layer.output.kind == OutputKind::kInt8 && layer.output.relu) {  // a bound among others
    layer.output.low = std::max(layer.output.low, layer.output.zero);
    layer.output.relu = false;
  }
  const bool words = layer.group_channels == 1 && layer.output.fours && aligned(layer.x);
  if (words && windows.dilation[0] == 1 && layer.k == windows.kernel_width * windows.kernel_width) {
    switch (windows.kernel_width) {
      case 3:
        return launch_columns<3>(layer, stream);
      case 5:
        return launch_columns<5>(layer, stream);
      case 7:
        return launch_columns<7>(layer, stream);
    }
  }
  const int64_t threads = layer.output.rows * ((layer.output.channels + kFour - 1) / kFour);
  return launch(&depthwise_any, (threads + kThreads - 1) / kThreads, kThreads, stream, layer);
}

}  // namespace dfq

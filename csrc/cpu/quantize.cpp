// Float activations to int8, in channels_last memory whatever the layout of the input.
// The specification is dfq_kernels/quantize.py; the integers are equal to it.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "bytes.h"
#include "common.h"

namespace dfq {
namespace {

constexpr int64_t kSpan = 32768;  // elements that a thread takes at once

struct Scale {
  float inverse;
  int64_t zero, low, high;  // as they are stored
};

// n neighbours.
struct QuantizeSpan {
  template <int W, class T>
  static DFQ_INLINE void run(const T* x, int8_t* out, int64_t n, Scale scale) {
    const StoredGrid<W> grid(scale.zero, scale.low, scale.high);
    const auto inverse = floats<W>(scale.inverse);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      grid.store(out + i, load<W>(x + i) * inverse);
    }
    if (i < n) {
      T last[kLanes] = {};
      int8_t codes[kLanes];
      std::copy_n(x + i, n - i, last);
      grid.store(codes, load<W>(last) * inverse);
      std::copy_n(codes, n - i, out + i);
    }
  }
};

// The codes of a row from [C, W] to [W, C]; kChannels is C, if that is known here.
template <int64_t kChannels>
struct Interleave {
  template <int W>
  static DFQ_INLINE void run(const int8_t* from, int64_t channels, int64_t width, int8_t* to) {
    const int64_t count = kChannels ? kChannels : channels;
    for (int64_t w = 0; w < width; ++w) {
      for (int64_t c = 0; c < count; ++c) {
        to[w * count + c] = from[c * width + w];
      }
    }
  }
};

// The pixels of one row of an image, from any strides.
template <class T>
struct ImageRows {
  const T* x;
  int8_t* out;
  int64_t size[4], stride[4];  // of x, [B, C, H, W]
  Scale scale;

  int64_t count() const { return size[0] * size[2]; }

  void quantize(int64_t row) const {
    const int64_t channels = size[1], width = size[3];
    const T* from = x + row / size[2] * stride[0] + row % size[2] * stride[2];
    int8_t* to = out + row * width * channels;
    std::vector<T> values(width);
    std::vector<int8_t> codes(channels * width);
    for (int64_t c = 0; c < channels; ++c) {
      const T* channel = from + c * stride[1];
      if (stride[3] != 1) {
        for (int64_t w = 0; w < width; ++w) {
          values[w] = channel[w * stride[3]];
        }
        channel = values.data();
      }
      run<QuantizeSpan>(channel, codes.data() + c * width, width, scale);
    }
    channels == 3 ? run<Interleave<3>>(codes.data(), channels, width, to)
                  : run<Interleave<0>>(codes.data(), channels, width, to);
  }
};

// Whether x lies in memory as the output does.
bool in_output_order(const Tensor& x) {
  if (x.dim() != 4) {
    return x.is_contiguous();
  }
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) {
      return false;
    }
    expected *= x.size(d);
  }
  return true;
}

template <class T>
void quantize_into(const Tensor& x, int8_t* out, Scale scale) {
  const T* from = data<T>(x);
  if (x.dim() == 4 && !in_output_order(x)) {
    ImageRows<T> rows{from, out, {}, {}, scale};
    for (int64_t d = 0; d < 4; ++d) {
      rows.size[d] = x.size(d);
      rows.stride[d] = x.stride(d);
    }
    const int64_t grain = ceil_div(kSpan, std::max<int64_t>(1, x.size(1) * x.size(3)));
    for_each_chunk(rows.count(), [&](int64_t row) { rows.quantize(row); }, grain);
    return;
  }
  for_each_chunk(ceil_div(x.numel(), kSpan), [&](int64_t chunk) {
    const int64_t begin = chunk * kSpan;
    run<QuantizeSpan>(from + begin, out + begin, std::min(kSpan, x.numel() - begin), scale);
  });
}

Tensor quantize_cpu(const Tensor& input, const Tensor& scale, const Tensor& zero_point,
                    int64_t quant_min, int64_t quant_max, int64_t offset) {
  STD_TORCH_CHECK(scale.numel() == 1 && zero_point.numel() == 1,
                  "expected one scale and one zero point, got ", scale.numel(), " and ",
                  zero_point.numel());
  const auto grid = make_grid(*scale.const_data_ptr<float>(), *zero_point.const_data_ptr<float>(),
                              quant_min, quant_max);
  const int64_t zero = quant_min - static_cast<int64_t>(grid.low) - offset;
  const Scale stored{grid.inverse, zero, quant_min - offset, quant_max - offset};
  const bool images = input.dim() == 4;
  const Tensor x = images || input.is_contiguous() ? input : torch::stable::contiguous(input);
  const Tensor y =
      torch::stable::empty(x.sizes(), ScalarType::Char, std::nullopt, x.device(), std::nullopt,
                           images ? torch::headeronly::MemoryFormat::ChannelsLast
                                  : torch::headeronly::MemoryFormat::Contiguous);
  if (x.numel() > 0) {
    with_storage(x.scalar_type(), [&](auto* type) {
      quantize_into<std::remove_pointer_t<decltype(type)>>(x, mutable_data<int8_t>(y), stored);
    });
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dfq_C, m) {
  m.def(
      "quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
      "int offset) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dfq_C, CPU, m) { m.impl("quantize", TORCH_BOX(&quantize_cpu)); }

}  // namespace dfq

// Integers of one grid as integers of another: one byte read and one written for each.
// The specification is dfq_kernels/requantize.py; the integers are equal to it.
#include <algorithm>

#include "bytes.h"
#include "common.h"

namespace dfq {
namespace {

constexpr int64_t kSpan = 65536;  // elements that a thread takes at once

struct Grids {
  float scale, inverse;  // of the old grid, and 1 / that of the new
  float zero;            // what stands for zero in the old
  int64_t new_zero, low, high;
};

struct RequantizeSpan {
  template <int W>
  static DFQ_INLINE void run(const int8_t* codes, int8_t* out, int64_t n, Grids grids) {
    const StoredGrid<W> grid(grids.new_zero, grids.low, grids.high);
    const auto scale = floats<W>(grids.scale), inverse = floats<W>(grids.inverse);
    const auto zero = floats<W>(grids.zero);
    const auto step = [&](const int8_t* from, int8_t* to) __attribute__((always_inline)) {
      Integers<W> code;
      load_bytes(from, code);
      grid.store(to, (to_floats(code) - zero) * scale * inverse);
    };
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      step(codes + i, out + i);
    }
    if (i < n) {
      int8_t last[kLanes] = {}, result[kLanes];
      std::copy_n(codes + i, n - i, last);
      step(last, result);
      std::copy_n(result, n - i, out + i);
    }
  }
};

Tensor requantize_cpu(const Tensor& codes, double scale, double new_scale, int64_t zero,
                      int64_t new_zero, int64_t low, int64_t high) {
  STD_TORCH_CHECK(codes.scalar_type() == ScalarType::Char, "codes must be int8");
  const Tensor y = torch::stable::empty_like(codes);
  const Grids grids{static_cast<float>(scale),
                    1.0f / static_cast<float>(new_scale),
                    static_cast<float>(zero),
                    new_zero,
                    low,
                    high};
  const int8_t* from = data<int8_t>(codes);
  int8_t* to = mutable_data<int8_t>(y);
  for_each_chunk(ceil_div(codes.numel(), kSpan), [&](int64_t chunk) {
    const int64_t begin = chunk * kSpan;
    run<RequantizeSpan>(from + begin, to + begin, std::min(kSpan, codes.numel() - begin), grids);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dfq_C, m) {
  m.def(
      "requantize(Tensor codes, float scale, float new_scale, int zero, int new_zero, int low, "
      "int high) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dfq_C, CPU, m) { m.impl("requantize", TORCH_BOX(&requantize_cpu)); }

}  // namespace dfq

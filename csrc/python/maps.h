// The index maps of csrc/core for Python: what tensor cores multiply, and where it comes from.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "core/fragments.h"
#include "core/windows.h"

namespace dfq {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Places are numbers: byte `row * 32 + byte` of A or B, sum `row * 8 + column`, segment
// `row * 2 + index`.
inline int place_of(Word word) { return word.row * kProductBytes + word.byte; }
inline int place_of(Cell cell) { return cell.row * kProductColumns + cell.column; }
inline int place_of(Segment segment) {
  return segment.row * (kProductBytes / kSegment) + segment.index;
}

// From the fragments of 32 lanes, [32, 4] and [32, 2], the sums [16, 8].
template <bool kInt4>
Array<int32_t> products(const Array<uint32_t>& a, const Array<uint32_t>& b) {
  Fragments warp[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      warp[lane].a[i] = a.at(lane, i);
    }
    for (int i = 0; i < 2; ++i) {
      warp[lane].b[i] = b.at(lane, i);
    }
  }
  Array<int32_t> sums({kProductRows, kProductColumns});
  for (int row = 0; row < kProductRows; ++row) {
    for (int column = 0; column < kProductColumns; ++column) {
      sums.mutable_at(row, column) = product<kInt4>(warp, {row, column});
    }
  }
  return sums;
}

// For each row and byte of it where that lies in the images, or -1 beyond their border.
inline Array<int64_t> window_offsets(std::array<int32_t, 2> size, std::array<int32_t, 2> out_size,
                                     std::array<int32_t, 2> stride, std::array<int32_t, 2> padding,
                                     std::array<int32_t, 2> dilation, int32_t kernel_width,
                                     int32_t pixel_bytes, int32_t tap_bytes, int64_t rows,
                                     int32_t row_bytes) {
  const Windows windows{size[0],
                        size[1],
                        out_size[0],
                        out_size[1],
                        kernel_width,
                        {stride[0], stride[1]},
                        {padding[0], padding[1]},
                        {dilation[0], dilation[1]},
                        pixel_bytes,
                        tap_bytes,
                        Divider(tap_bytes),
                        Divider(kernel_width)};
  Array<int64_t> offsets({rows, static_cast<int64_t>(row_bytes)});
  for (int64_t row = 0; row < rows; ++row) {
    const Windows::Corner corner = windows.corner(row);
    for (int32_t k = 0; k < row_bytes; ++k) {
      const Windows::Step step = windows.step(k);
      offsets.mutable_at(row, k) = windows.inside(corner, step) ? corner.offset + step.offset : -1;
    }
  }
  return offsets;
}

inline void define_maps(py::module_& m) {
  m.def("word_of_a", py::vectorize([](int lane, int i) { return place_of(word_of_a(lane, i)); }));
  m.def("word_of_b", py::vectorize([](int lane, int i) { return place_of(word_of_b(lane, i)); }));
  m.def("cell_of_sum",
        py::vectorize([](int lane, int i) { return place_of(cell_of_sum(lane, i)); }));
  m.def("namer", py::vectorize(&namer));
  m.def("segment_of_a", py::vectorize([](int lane) { return place_of(segment_of_a(lane)); }));
  m.def("segment_of_b", py::vectorize([](int lane) { return place_of(segment_of_b(lane)); }));
  m.def("slot_of_segment", py::vectorize(&slot_of_segment));
  m.def("dot_int8", py::vectorize(&dot_int8));
  m.def("dot_int4", py::vectorize(&dot_int4));
  m.def("products_int8", &products<false>);
  m.def("products_int4", &products<true>);
  m.def("quotient_by_product",
        py::vectorize([](int32_t value, int32_t divisor) { return Divider(divisor)(value); }));
  m.def("window_offsets", &window_offsets);
}

}  // namespace dfq

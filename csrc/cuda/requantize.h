// requantize on the device: what the op hands to the kernel.
#pragma once

#include "layout.h"

namespace dfq {

// From integers of one grid to those of another.
struct Requantizer {
  float scale, inverse;  // of the old grid, and 1 / that of the new
  int32_t zero;          // what stands for zero in the old
  int32_t new_zero, low, high;
};

// `out` lies on an address that is a multiple of 16.
Failure requantize(const Requantizer& grids, const int8_t* codes, int8_t* out, int64_t count,
                   void* stream);

}  // namespace dfq

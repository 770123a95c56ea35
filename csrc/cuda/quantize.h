// quantize on the device: what the op hands to the kernels.
#pragma once

#include "fake_quantize.h"

namespace dfq {

// The int8 of x are written in the order in which the output lies, from `x` that lies
enum class Order {
  kSame,    // likewise, on addresses that are multiples of 16
  kPlanes,  // as [B, C, P] for an output [B, P, C], pixels next to one another
  kAny,
};

struct Codes {
  Quantizer quantizer;
  int64_t offset;
  Storage storage;
  Order order;
  const void* x;
  int8_t* out;
  int64_t count;
  Strides strides;  // if kAny
  // If kPlanes:
  int64_t batch, channels, pixels;
  int64_t batch_stride, channel_stride;
  bool vectors;  // whether each plane begins at a multiple of 16 bytes
};

Failure quantize(const Codes& codes, void* stream);

}  // namespace dfq

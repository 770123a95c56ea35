// Convolutions with a group for each channel of x: what qconv2d hands to their kernels.
#pragma once

#include "integer_gemm.h"

namespace dfq {

// Nothing is packed but weights.
Failure depthwise(const IntegerLayer& layer, void* stream);

}  // namespace dfq

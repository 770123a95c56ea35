// Integer layers as matrix products on tensor cores. The specifications are dfq_kernels/qlinear.py
// and qconv2d.py; outputs are equal to them, bit for bit.
#include "integer_gemm.h"
#include "integer_gemm_kernel.h"

namespace dfq {

Failure integer_gemm(const IntegerLayer& layer, void* stream) {
  if (layer.x_packed) {
    return integer_gemm_of_packed(layer, stream);
  }
  return layer.weight_packed ? launch_integer_gemm<false, true>(layer, stream)
                             : launch_integer_gemm<false, false>(layer, stream);
}

}  // namespace dfq

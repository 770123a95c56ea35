// Integer layers whose x is packed; in a file of their own because two compile at a time.
#include "integer_gemm.h"
#include "integer_gemm_kernel.h"

namespace dfq {

Failure integer_gemm_of_packed(const IntegerLayer& layer, void* stream) {
  return layer.weight_packed ? launch_integer_gemm<true, true>(layer, stream)
                             : launch_integer_gemm<true, false>(layer, stream);
}

}  // namespace dfq

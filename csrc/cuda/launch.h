// How kernels are launched: by this one function, so that the same sources also run on a CPU, in
// the emulation of the tests (DFQ_EMULATE_CUDA).
#pragma once

#include <climits>
#include <cstdint>

#include "layout.h"

#if defined(DFQ_EMULATE_CUDA)
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#define DFQ_ASSERT_ALIGNED(...)
#define DFQ_SHARED(Type, name, count) __shared__ Type name[count]
#endif

#define DFQ_DEVICE __device__ __forceinline__

namespace dfq {

template <class... Parameters, class... Arguments>
Failure launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
               const Arguments&... arguments) {
  if (blocks > INT_MAX) {
    return "the tensor is too large for one launch";
  }
#if defined(DFQ_EMULATE_CUDA)
  static_cast<void>(stream);
  return emulated::run(blocks, threads, [&] { kernel(arguments...); });
#else
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

}  // namespace dfq

// What every CPU op shares: chunks for threads, the best instruction set, storage types.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>

#include "narrow.h"

namespace dfq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// f(chunk) for chunk = 0 .. chunks - 1, shared out among PyTorch's threads, `grain` at least to
// each. Choose the number of chunks by the shape alone and give each its own output: then results
// do not depend on threads.
template <class F>
void for_each_chunk(int64_t chunks, const F& f, int64_t grain = 1) {
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      f(chunk);
    }
  });
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// run<Kernel>(args...) is Kernel::run<W>(args...), compiled once for each instruction set and
// chosen at run time; W is the number of float32 in a vector register. Kernel::run must be
// `template <int W> static DFQ_INLINE void run(...)`, and all that it calls DFQ_INLINE too.
#if defined(__x86_64__) && !defined(DFQ_ONE_ISA)
#define DFQ_TARGET(arch) __attribute__((target(arch), noinline))

template <class Kernel, class... Args>
DFQ_TARGET("arch=x86-64-v4,prefer-vector-width=512")
void run_v4(Args... args) {
  Kernel::template run<16>(args...);
}
template <class Kernel, class... Args>
DFQ_TARGET("arch=x86-64-v3")
void run_v3(Args... args) {
  Kernel::template run<8>(args...);
}
#undef DFQ_TARGET

// 4, 3 or 1: the best that this processor has; DFQ_ISA=v3 or v1 asks for less.
inline int instruction_set() {
  static const int level = [] {
    const char* asked = std::getenv("DFQ_ISA");
    const int most = asked && asked[0] == 'v' ? asked[1] - '0' : 4;
    const int best = __builtin_cpu_supports("x86-64-v4")   ? 4
                     : __builtin_cpu_supports("x86-64-v3") ? 3
                                                           : 1;
    return most < best ? most : best;
  }();
  return level;
}

template <class Kernel, class... Args>
void run(Args... args) {
  switch (instruction_set()) {
    case 4:
      return run_v4<Kernel>(args...);
    case 3:
      return run_v3<Kernel>(args...);
    default:
      return Kernel::template run<4>(args...);
  }
}
#else
template <class Kernel, class... Args>
void run(Args... args) {
  Kernel::template run<4>(args...);
}
#endif

// f(T*) with a null pointer of the storage type: float, BFloat16 or Half.
template <class F>
void with_storage(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "expected float32, float16 or bfloat16, got ",
                      torch::headeronly::toString(type));
  }
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace dfq

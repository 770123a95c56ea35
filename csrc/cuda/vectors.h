// Sixteen bytes of a tensor at a time, and where they come from.
#pragma once

#include "core/dimensions.h"
#include "core/storage.h"
#include "launch.h"

namespace dfq {

template <class T>
constexpr int kLanes = 16 / sizeof(T);

// f(T*) with a null pointer of the storage type.
template <class F>
Failure with_storage(Storage storage, const F& f) {
  switch (storage) {
    case Storage::kFloat:
      return f(static_cast<float*>(nullptr));
    case Storage::kHalf:
      return f(static_cast<Half*>(nullptr));
    default:
      return f(static_cast<BFloat16*>(nullptr));
  }
}

template <class T>
DFQ_DEVICE void unpack(const uint4& vector, float (&values)[kLanes<T>]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      values[i] = bits_of<float>(words[i]);
    } else {
      values[2 * i] = to_float(bits_of<T>(static_cast<uint16_t>(words[i] & 0xffffu)));
      values[2 * i + 1] = to_float(bits_of<T>(static_cast<uint16_t>(words[i] >> 16)));
    }
  }
}

// Two 16-bit values, the first in the lower half.
template <class T>
DFQ_DEVICE uint32_t pack_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t pair;
  if constexpr (std::is_same_v<T, Half>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#endif
}

template <class T>
DFQ_DEVICE uint4 pack(const float (&values)[kLanes<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = bits_of<uint32_t>(values[i]);
    } else {
      words[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Not plain copies: the compiler might merge them with those of a part, element by element.
DFQ_DEVICE uint4 load_vector(const void* from) {
  DFQ_ASSERT_ALIGNED(from);
  return __ldg(static_cast<const uint4*>(from));
}
DFQ_DEVICE void store_vector(void* to, const uint4& vector) {
  DFQ_ASSERT_ALIGNED(to);
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(vector.x), "r"(vector.y),
               "r"(vector.z), "r"(vector.w)
               : "memory");
#else
  *static_cast<uint4*>(to) = vector;
#endif
}

// An unsigned integer as wide as T.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

// A vector of the elements 0 .. count - 1, and zeros. They are pushed in from one end: a register
// has no index.
template <class T, class F>
DFQ_DEVICE uint4 gather(int count, const F& element) {
  constexpr int kBits = 8 * sizeof(T);
  uint64_t low = 0, high = 0;
  DFQ_ROLLED
  for (int i = 0; i < kLanes<T>; ++i) {
    const uint64_t bits = i < count ? bits_of<Bits<T>>(element(i)) : 0;
    low = low >> kBits | high << (64 - kBits);
    high = high >> kBits | bits << (64 - kBits);
  }
  return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
          static_cast<uint32_t>(high >> 32)};
}

// Inputs that lie in memory as the output does, on addresses that are multiples of 16.
struct Dense {
  static constexpr int kAhead = 2;  // steps of a walk that are asked for in advance
  const void* input[kInputs];

  template <class T>
  DFQ_DEVICE uint4 vector(int i, int64_t position) const {
    return load_vector(static_cast<const T*>(input[i]) + position);
  }
  template <class T>
  DFQ_DEVICE uint4 part(int i, int64_t position, int count) const {
    return gather<T>(count, [&](int j) { return static_cast<const T*>(input[i])[position + j]; });
  }
  template <class T>
  DFQ_DEVICE void store(void* out, int64_t position, const uint4& vector) const {
    store_vector(static_cast<T*>(out) + position, vector);
  }
  template <class T>
  DFQ_DEVICE void store_part(void* out, int64_t position, const uint4& vector, int count) const {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
    constexpr int kEach = 4 / sizeof(T);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i < count) {
        const auto bits = static_cast<Bits<T>>(words[i / kEach] >> (i % kEach * 16));
        static_cast<T*>(out)[position + i] = bits_of<T>(bits);
      }
    }
  }
};

// Inputs of any strides, in any type: they are rare enough for one kernel. T is float, whatever is
// stored.
struct Strided {
  static constexpr int kAhead = 0;
  const void* input[kInputs];
  Strides strides;
  Storage storage;

  template <class T>
  DFQ_DEVICE uint4 vector(int i, int64_t position) const {
    return part<T>(i, position, kLanes<T>);
  }
  template <class T>
  DFQ_DEVICE uint4 part(int i, int64_t position, int count) const {
    return gather<T>(count, [&](int j) {
      const int64_t at = strides.offset(i, position + j);
      return storage == Storage::kFloat  ? static_cast<const float*>(input[i])[at]
             : storage == Storage::kHalf ? to_float(static_cast<const Half*>(input[i])[at])
                                         : to_float(static_cast<const BFloat16*>(input[i])[at]);
    });
  }
  template <class T>
  DFQ_DEVICE void store(void* out, int64_t position, const uint4& vector) const {
    store_part<T>(out, position, vector, kLanes<T>);
  }
  template <class T>
  DFQ_DEVICE void store_part(void* out, int64_t position, const uint4& vector, int count) const {
    float values[kLanes<T>];
    unpack<T>(vector, values);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i < count) {
        store_one(out, position + i, values[i]);
      }
    }
  }

 private:
  DFQ_DEVICE void store_one(void* out, int64_t position, float value) const {
    if (storage == Storage::kFloat) {
      static_cast<float*>(out)[position] = value;
    } else if (storage == Storage::kHalf) {
      static_cast<Half*>(out)[position] = from_float<Half>(value);
    } else {
      static_cast<BFloat16*>(out)[position] = from_float<BFloat16>(value);
    }
  }
};

}  // namespace dfq

// Neighbouring numbers of a row, which a lane stores or reads in one access.
#pragma once

#include <type_traits>

#include "cuda/mma_sm80.cuh"

namespace dsmoe::cuda {

__device__ __forceinline__ float to_float(float v) {
  return v;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
__device__ __forceinline__ float to_float(__half v) {
  return __half2float(v);
}

// What one access moves.
template <int kBytes>
using Access = std::conditional_t<kBytes == 16, uint4, uint2>;

// Neighbouring numbers for the workspace, or of a result in half types. fp32 is rounded to tf32.
template <class T, int kCount>
struct Neighbours {
  using All = Access<kCount * sizeof(T)>;
  static_assert(sizeof(All) == kCount * sizeof(T));
  alignas(16) uint32_t words[sizeof(All) / 4];

  __device__ __forceinline__ void set(int two, float low, float high) {
    if constexpr (std::is_same_v<T, float>) {
      words[2 * two] = to_tf32(low);
      words[2 * two + 1] = to_tf32(high);
    } else {
      words[two] = pack(low, high, T());
    }
  }
  __device__ __forceinline__ void store(T* to) const {
    __stcg(reinterpret_cast<All*>(to), reinterpret_cast<const All&>(words));
  }
};

template <class T, int kCount>
__device__ __forceinline__ bool in_one_access(const T* at, int count) {
  static_assert(kCount * sizeof(T) == 8 || kCount * sizeof(T) == 16);
  return count >= kCount && reinterpret_cast<uintptr_t>(at) % (kCount * sizeof(T)) == 0;
}

// Anywhere: one access where that is aligned, single numbers else. count: numbers that exist; others are
// not touched.
template <class T, int kCount>
__device__ __forceinline__ void store_rounded(T* to, const T (&v)[kCount], int count) {
  using All = Access<kCount * sizeof(T)>;
  if (in_one_access<T, kCount>(to, count)) {
    __stcg(reinterpret_cast<All*>(to), reinterpret_cast<const All&>(v));
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) to[i] = v[i];
    }
  }
}

// Zeros where no number exists.
template <class T, int kCount>
__device__ __forceinline__ void read_rounded(T (&v)[kCount], const T* from, int count) {
  using All = Access<kCount * sizeof(T)>;
  reinterpret_cast<All&>(v) = All{};
  if (in_one_access<T, kCount>(from, count)) {
    reinterpret_cast<All&>(v) = *reinterpret_cast<const All*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) v[i] = from[i];
    }
  }
}

}  // namespace dsmoe::cuda

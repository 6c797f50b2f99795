// g = x_t Wg and u = x_t Wu of the active pairs, kept by the forward for the backward.
//
//   saved [T,2,I]   a token's g, then its u
//
// A lane holds neighbouring neurons, but an expert's rows may begin anywhere: one access where that is
// aligned, single numbers else and at an expert's end. Inactive pairs are neither written nor read.
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

template <class T, int kCount>
__device__ __forceinline__ bool in_one_access(const T* at, int count) {
  static_assert(kCount * sizeof(T) == 8 || kCount * sizeof(T) == 16);
  return count >= kCount && reinterpret_cast<uintptr_t>(at) % (kCount * sizeof(T)) == 0;
}

// count: numbers that exist; others are not touched.
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
template <class T, int kCount>
__device__ __forceinline__ void store_saved(T* to, const float (&v)[kCount], int count) {
  alignas(16) T rounded[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) rounded[i] = static_cast<T>(v[i]);
  store_rounded(to, rounded, count);
}

// Zeros where no number exists.
template <class T, int kCount>
__device__ __forceinline__ void load_saved(float (&v)[kCount], const T* from, int count) {
  using All = Access<kCount * sizeof(T)>;
  alignas(16) T read[kCount] = {};
  if (in_one_access<T, kCount>(from, count)) {
    reinterpret_cast<All&>(read) = *reinterpret_cast<const All*>(from);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) read[i] = from[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = to_float(read[i]);
}

}  // namespace dsmoe::cuda

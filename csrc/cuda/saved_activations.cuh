// g = x_t Wg and u = x_t Wu of the active pairs, kept by the forward for the backward.
//
//   saved [T,2,I]   a token's g, then its u
//
// A lane holds neighbouring neurons, but an expert's rows may begin anywhere: one access where that is
// aligned, single numbers else and at an expert's end. Inactive pairs are neither written nor read.
//
// Beyond 65504 fp16 would keep infinities, and the backward make NaN of them: silu'(g) has a factor of
// g (1 - sigmoid(g)). So g and u are kept as fp16's largest number there: gradients stay finite, though
// those that hang on how large g or u was are too small.
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
  if constexpr (std::is_same_v<T, float>) {
    store_rounded(to, v, count);
  } else {
    alignas(16) uint32_t packed[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) packed[i] = pack_finite(v[2 * i], v[2 * i + 1], T());
    store_rounded(to, reinterpret_cast<const T(&)[kCount]>(packed), count);
  }
}

// Zeros where no number exists.
template <class T, int kCount>
__device__ __forceinline__ void read_saved(T (&v)[kCount], const T* from, int count) {
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
template <class T, int kCount>
__device__ __forceinline__ void load_saved(float (&v)[kCount], const T* from, int count) {
  alignas(16) T read[kCount];
  read_saved(read, from, count);
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = to_float(read[i]);
}

}  // namespace dsmoe::cuda

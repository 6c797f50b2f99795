// g = x_t Wg and u = x_t Wu of the active pairs, kept by the forward for the backward.
//
//   saved [T,2,I]   a token's g, then its u
//
// A lane holds neighbouring neurons, but an expert's rows may begin anywhere. Inactive pairs are neither
// written nor read.
//
// Beyond 65504 fp16 would keep infinities, and the backward make NaN of them: act'(g) has a factor of
// g (1 - sigmoid(g)). So g and u are kept as fp16's largest number there: gradients stay finite, though
// those that hang on how large g or u was are too small.
#pragma once

#include "cuda/neighbours.cuh"

namespace dsmoe::cuda {

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
__device__ __forceinline__ void load_saved(float (&v)[kCount], const T* from, int count) {
  alignas(16) T read[kCount];
  read_rounded(read, from, count);
#pragma unroll
  for (int i = 0; i < kCount; ++i) v[i] = to_float(read[i]);
}

}  // namespace dsmoe::cuda

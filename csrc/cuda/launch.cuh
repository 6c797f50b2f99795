// What every launcher needs: sizes of grids, the status of a launch, and words for a warp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"

namespace dsmoe::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

inline Status launch_status() {
  return cudaGetLastError() == cudaSuccess ? Status::kOk : Status::kCudaError;
}

// Of the current device; 0 if it cannot be asked.
inline int multiprocessor_count() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  const auto what = cudaDevAttrMultiProcessorCount;
  return cudaDeviceGetAttribute(&count, what, device) == cudaSuccess ? count : 0;
}

// Sum over the warp, the same in every lane: a butterfly, so the order of the sum is fixed.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

// Sum over the lanes up to and including this one.
__device__ __forceinline__ int warp_inclusive_sum(int value) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

}  // namespace dsmoe::cuda

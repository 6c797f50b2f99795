// What every launcher needs: sizes of grids, the status of a launch, and words for a warp.  launch.cu
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

// As this thread took them last.
const Settings& settings();

// Of all launches before; keeps the name of what failed.
Status launch_status();
// After a call that failed, which the runtime does not know of if it was another library's.
Status failed(const char* otherwise = "an unknown error");

// Of the current device, as many as the settings allow; 0 if it cannot be asked.
int multiprocessor_count();

inline bool aligned_16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
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

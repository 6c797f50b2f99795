// Small kernels with and without data races; FAULT picks what is wrong. test_races.py says what
// must be found.
#include <cuda_runtime.h>

#ifndef FAULT
#define FAULT 0
#endif

// Each thread writes one word and reads its neighbour's, across warps or within one.
extern "C" __global__ void exchange(const int* in, int* out) {
  __shared__ int tile[128];
  const int t = threadIdx.x, i = blockIdx.x * 128 + t;
  tile[t] = in[i];
  if (FAULT != 1) __syncthreads();
  const int neighbour = tile[(t + 1) % 128];
  if (FAULT != 2) __syncthreads();
  tile[t] = neighbour * 2;
  if (FAULT != 3) __syncwarp();
  out[i] = tile[t ^ 1];
  if (FAULT == 4) out[i ^ 1] = 0;
}

// The last CTA to arrive sums what the others left in global memory.
extern "C" __global__ void last_one_sums(const int* in, int* partial, unsigned* arrived,
                                         int* total) {
  __shared__ bool is_last;
  const int t = threadIdx.x;
  if (t < 32) partial[blockIdx.x * 32 + t] = in[blockIdx.x * 32 + t];
  if (FAULT != 2) __syncthreads();
  if (t == 0) {
    if (FAULT != 1) __threadfence();
    is_last = atomicAdd(arrived, 1) == gridDim.x - 1;
    if (FAULT != 3) __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  if (t == 40) {
    int sum = 0;
    for (int i = 0; i < int(gridDim.x) * 32; ++i) sum += partial[i];
    *total = sum;
  }
}

// A chain of CTAs, each of which spins until its predecessor has published its sum: decoupled
// look-back.
extern "C" __global__ void chain(const int* in, int* sums, int* flags, int* out) {
  const int b = FAULT == 4 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  if (threadIdx.x == 0) {
    int before = 0;
    if (b > 0) {
      while (*reinterpret_cast<volatile int*>(&flags[b - 1]) == 0) {
      }
      if (FAULT != 1) __threadfence();
      before = sums[b - 1];
    }
    sums[b] = before + in[b];
    if (FAULT != 2) __threadfence();
    *reinterpret_cast<volatile int*>(&flags[b]) = 1;
    if (FAULT == 3) sums[b] = 0;
    out[b] = before;
  }
}

// How fp32 matrices are multiplied on the tile of gemm_ffma.cuh: exactly, or rounded to tf32.
//
// A product says which outputs of the 64 x 64 a thread has, [kRows][kParts][kNeighbours], and adds what
// one step (kStepTerms terms) of two matrices in shared memory contributes to them:
//
//   FfmaProduct   fused multiply-adds; 8 rows x 4 neighbouring columns, 3 vector loads for 32 of them
//   Tf32Product   mma.m16n8k8; four warps of 32 x 32. Numbers are rounded to 10 bits on their way into
//                 shared memory, as torch.backends.cuda.matmul's tf32 does; sums are fp32
//
// The layout serves both: term outermost, blocks of 8 rows exchanged by (term / 4) ^ term. So neither the
// transposing stores (rows x groups of 4 terms), nor vectors of one term, nor the fragments of an mma
// (8 rows x 4 terms) meet a bank conflict.
#pragma once

#include "cuda/mma_sm80.cuh"
#include "cuda/token_pass.cuh"

namespace dsmoe::cuda {

struct FfmaTile {
  static constexpr int kTileM = 64, kTileN = 64, kTerms = 16;
  static constexpr int kGroups = kTerms / 4;                   // groups of 4 terms, 16 bytes
  static constexpr int kCopies = kTileM * kGroups / kThreads;  // vectors a thread copies: 2
  static constexpr int kMatrixFloats = kTerms * kTileM;
  static_assert(kTileM == kTileN, "one layout for both operands");

  static __device__ __forceinline__ int at(int term, int row) {
    return term * kTileM + (row ^ ((term / 4 ^ term) % 4) * 8);
  }
};

__device__ __forceinline__ float component(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

struct FfmaProduct {
  static constexpr int kRows = 8, kParts = 1, kNeighbours = 4, kStepTerms = 1;
  static constexpr int kThreadsN = FfmaTile::kTileN / kNeighbours;  // 16
  static_assert(FfmaTile::kTileM / kRows * kThreadsN == kThreads);
  using Sums = float[kRows][kParts][kNeighbours];
  using Vector = float4;

  static __device__ __forceinline__ int row(int i) { return threadIdx.x / kThreadsN * kRows + i; }
  static __device__ __forceinline__ int column(int) {
    return threadIdx.x % kThreadsN * kNeighbours;
  }
  static __device__ __forceinline__ float rounded(float v) { return v; }

  static __device__ __forceinline__ void add(Sums& sums, const float* a, const float* b, int term) {
    const float4 low = *reinterpret_cast<const float4*>(a + FfmaTile::at(term, row(0)));
    const float4 high = *reinterpret_cast<const float4*>(a + FfmaTile::at(term, row(0)) + 4);
    const float4 columns = *reinterpret_cast<const float4*>(b + FfmaTile::at(term, column(0)));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float row = i < 4 ? component(low, i) : component(high, i - 4);
#pragma unroll
      for (int j = 0; j < kNeighbours; ++j) {
        sums[i][0][j] = fmaf(row, component(columns, j), sums[i][0][j]);
      }
    }
  }
};

struct Tf32Product {
  static constexpr int kRows = 4, kParts = 4, kNeighbours = 2, kStepTerms = 8;
  static constexpr int kWarpsN = 2, kWarpRows = 32, kWarpColumns = 32;
  using Sums = float[kRows][kParts][kNeighbours];
  using Vector = float2;

  static __device__ __forceinline__ int warp_row() {
    return threadIdx.x / kWarp / kWarpsN * kWarpRows;
  }
  static __device__ __forceinline__ int warp_column() {
    return threadIdx.x / kWarp % kWarpsN * kWarpColumns;
  }
  static __device__ __forceinline__ int row(int i) {
    return warp_row() + i * 8 + threadIdx.x % kWarp / 4;
  }
  static __device__ __forceinline__ int column(int part) {
    return warp_column() + part * 8 + threadIdx.x % 4 * 2;
  }
  static __device__ __forceinline__ float rounded(float v) { return round_tf32(v); }

  static __device__ __forceinline__ void add(Sums& sums, const float* a, const float* b, int term) {
    const int lane = threadIdx.x % kWarp, low = term + lane % 4, high = low + 4;
    const int group_column = warp_column() + lane / 4;
    float left[kRows][2];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      left[i][0] = a[FfmaTile::at(low, row(i))];
      left[i][1] = a[FfmaTile::at(high, row(i))];
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      const float right[2] = {b[FfmaTile::at(low, group_column + part * 8)],
                              b[FfmaTile::at(high, group_column + part * 8)]};
#pragma unroll
      for (int i = 0; i < kRows; i += 2) {
        mma_tf32(sums[i][part], sums[i + 1][part], left[i], left[i + 1], right);
      }
    }
  }
};

// Calls launch with the product that is wanted.
template <class Launch>
void with_product(bool allow_tf32, Launch launch) {
  if (allow_tf32) {
    launch(Tf32Product());
  } else {
    launch(FfmaProduct());
  }
}

// A thread's neighbouring outputs, in one access.
template <class Product>
__device__ __forceinline__ void store_neighbours(float* to,
                                                 const float (&v)[Product::kNeighbours]) {
  alignas(16) float all[Product::kNeighbours];
#pragma unroll
  for (int i = 0; i < Product::kNeighbours; ++i) all[i] = v[i];
  using Vector = typename Product::Vector;
  __stcg(reinterpret_cast<Vector*>(to), reinterpret_cast<const Vector&>(all));
}
template <class Product>
__device__ __forceinline__ void add_neighbours(float* to, const float (&v)[Product::kNeighbours]) {
  using Vector = typename Product::Vector;
  alignas(16) float sum[Product::kNeighbours];
  reinterpret_cast<Vector&>(sum) = *reinterpret_cast<const Vector*>(to);
#pragma unroll
  for (int i = 0; i < Product::kNeighbours; ++i) sum[i] += v[i];
  *reinterpret_cast<Vector*>(to) = reinterpret_cast<const Vector&>(sum);
}

}  // namespace dsmoe::cuda

// The parts of a tile's main loop: shared-memory layouts without bank conflicts, and the pipeline.
//
// One step of a main loop takes kTileK = 32 of the sum. A stage of the pipeline holds the operands of
// one step; while the tensor cores work on a stage, cp.async fills the ones after it.
//
// Bank conflicts. ldmatrix reads eight rows of 16 bytes at once, which must lie in eight different
// 16-byte columns of the 128-byte rows of banks. So chunk c of row r is stored at c ^ f(r), where f
// takes the values that the eight rows need: for eight rows in a row, 64 bytes each, f = r / 2 % 4.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/mma_sm80.cuh"

namespace dsmoe::cuda {

constexpr int kTileK = 32;
constexpr int kChunk = 8;                       // 16-bit numbers in 16 bytes
constexpr int kChunksPerRow = kTileK / kChunk;  // 4
constexpr int kRowBytes = kTileK * 2;           // 64
constexpr int kStages = 3;                      // 48 KiB: two CTAs on every SM from sm_80 on

// Rows of kTileK numbers that ldmatrix reads eight in a row: the left operand.
struct RowTile {
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row >> 1 & 3)) * 16;
  }
};

// Rows of kTileK numbers, one per output column of a warp that has kBlocks blocks of 8 columns. Block j
// takes rows 2 kBlocks q + 2 j + i (q < 4, i < 2) instead of 8 j .. 8 j + 7: then the columns that a lane
// holds (2q, 2q + 1 of each block) are 2 kBlocks neighbours, and it stores 16 bytes at once.
template <int kBlocks>
struct ColumnTile {
  static_assert(kBlocks == 2 || kBlocks == 4);
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row / (2 * kBlocks) & 3)) * 16;
  }
  static __device__ __forceinline__ int row_of(int block, int column) {
    return 2 * kBlocks * (column / 2) + 2 * block + column % 2;
  }
};

// kTileK rows of 64 or 128 numbers, the sum running over the rows: read transposed, eight rows in a row.
template <int kNumbers>
struct DepthTile {
  static constexpr int kColumns = kNumbers, kChunks = kNumbers / kChunk;
  static constexpr int kBytes = kTileK * kNumbers * 2;
  static_assert(kChunks % 8 == 0, "a row fills whole rows of banks");
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kNumbers * 2 + (chunk ^ (row & 7)) * 16;
  }
};

// The left fragments of one 16-row block: lanes 0-15 address the rows, lanes 16-31 the same rows 8
// numbers further.
__device__ __forceinline__ void load_rows(uint32_t (&a)[4], uint32_t tile, int first_row,
                                          int k_chunk) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix_x4(a, tile + RowTile::offset(first_row + lane % 16, k_chunk + lane / 16));
}

// Runs load(stage, step) kStages - 1 steps ahead of compute(stage). Leaves no copy in flight, and ends
// with a barrier, so that the caller may load the next tile at once.
template <class Load, class Compute>
__device__ __forceinline__ void pipeline(int num_steps, Load load, Compute compute) {
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) {
    if (step < num_steps) load(step, step);
    cp_async_commit();
  }
  int stage = 0, load_stage = kStages - 1;
  for (int step = 0; step < num_steps; ++step) {
    cp_async_wait<kStages - 2>();  // this step's copies have landed: mine, and after the barrier
    __syncthreads();               // everyone's; also everyone is done with the stage loaded next
    const int ahead = step + kStages - 1;
    if (ahead < num_steps) load(load_stage, ahead);
    cp_async_commit();  // also if empty: wait counts groups
    compute(stage);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
  }
  __syncthreads();
}

}  // namespace dsmoe::cuda

// The parts of a tile's main loop: shared-memory layouts without bank conflicts, and the pipeline.
//
// One step of a main loop takes 64 bytes of every row: 32 terms of the sum in half types, 16 in fp32,
// which is multiplied as tf32. An mma takes 32 of these bytes, and its fragments are the same bytes for
// either. A stage of the pipeline holds the operands of one step; while the tensor cores work on a
// stage, cp.async fills the ones after it.
//
// Bank conflicts. ldmatrix reads eight rows of 16 bytes at once, which must lie in eight different
// 16-byte columns of the 128-byte rows of banks. So chunk c of row r is stored at c ^ f(r), where f
// takes the values that the eight rows need: for eight rows in a row, 64 bytes each, f = r / 2 % 4.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/mma_sm80.cuh"

namespace dsmoe::cuda {

constexpr int kChunk = 8;                      // 16-bit numbers in 16 bytes
constexpr int kRowBytes = 64;                  // of a row in a step
constexpr int kChunksPerRow = kRowBytes / 16;  // 4
constexpr int kStages = 3;                     // 48 KiB: two CTAs on every SM from sm_80 on
template <class T>
constexpr bool kIsFloat = sizeof(T) == 4;  // tf32
template <class T>
constexpr int kNumbers = 16 / sizeof(T);  // in 16 bytes
template <class T>
constexpr int kTileK = kRowBytes / sizeof(T);  // terms of a step
template <class T>
constexpr int kMmaTerms = kTileK<T> / 2;

// Blocks of 8 columns, out of a warp's kBlocks, of which a lane's numbers are stored together: in 16
// bytes, if there are enough.
template <class T, int kBlocks>
constexpr int kTogether = kBlocks < kNumbers<T> / 2 ? kBlocks : kNumbers<T> / 2;

// Rows that ldmatrix reads eight in a row: the left operand.
struct RowTile {
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row >> 1 & 3)) * 16;
  }
};

// Rows, one per output column of a warp. Of kGroup blocks of 8 columns, block j takes rows
// 2 kGroup q + 2 j + i (q < 4, i < 2) instead of 8 j .. 8 j + 7: then the columns that a lane holds (2q,
// 2q + 1 of each block) are 2 kGroup neighbours, and it stores them at once.
template <int kGroup>
struct ColumnTile {
  static_assert(kGroup == 2 || kGroup == 4);
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row / (2 * kGroup) & 3)) * 16;
  }
  static __device__ __forceinline__ int row_of(int block, int column) {
    return block / kGroup * kGroup * 8 + 2 * kGroup * (column / 2) + 2 * (block % kGroup) +
           column % 2;
  }
  // What this lane addresses for ldmatrix: block `block`, low and high k; block + 1, low and high k.
  static __device__ __forceinline__ uint32_t lane_offset(int first_row, int block, int k_chunk) {
    const int lane = threadIdx.x % kWarp;
    return offset(first_row + row_of(block + lane / 16, lane % 8), k_chunk + lane / 8 % 2);
  }
};

// kTileK rows of kColumns numbers, the sum running over the rows. ldmatrix transposes 16-bit numbers, reading
// eight rows in a row. fp32 is read by numbers: eight neighbours, two chunks, of four rows in a row.
template <class T, int kColumns>
struct DepthTile {
  static constexpr int kChunks = kColumns / kNumbers<T>;
  static constexpr int kRow = kChunks * 16, kBytes = kTileK<T> * kRow;
  static_assert(kChunks % 8 == 0, "a row fills whole rows of banks");
  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    const int exchange = kIsFloat<T> ? (row & 3) * 2 : row & 7;
    return row * kRow + (chunk ^ exchange) * 16;
  }

  // Left fragments of a block of 16 columns, the sum's terms from k on.
  static __device__ __forceinline__ void load_left(uint32_t (&a)[4], uint32_t tile, int k,
                                                   int block) {
    if constexpr (!kIsFloat<T>) {
      const int lane = threadIdx.x % kWarp;
      // matrices: low and high columns of the low terms, then of the high terms
      const int term = k + lane / 16 * 8 + lane % 8;
      ldmatrix_x4_trans(a, tile + offset(term, block * 2 + lane / 8 % 2));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = number(tile, k + i / 2 * 4, block * 2 + i % 2);
    }
  }
  // Right fragments of a block of 8 columns, and of the next one.
  static __device__ __forceinline__ void load_right(uint32_t (&b)[4], uint32_t tile, int k,
                                                    int block) {
    if constexpr (!kIsFloat<T>) {
      const int lane = threadIdx.x % kWarp;
      // matrices: the first block, low and high terms; the second, low and high terms
      ldmatrix_x4_trans(b, tile + offset(k + lane % 16, block + lane / 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = number(tile, k + i % 2 * 4, block + i / 2);
    }
  }

 private:
  // Of this lane, in four rows times a block of 8 columns. Written so that four addresses do for all blocks.
  static __device__ __forceinline__ uint32_t number(uint32_t tile, int first_row, int block) {
    const int row = threadIdx.x % 4, column = threadIdx.x % kWarp / 4;
    const uint32_t exchanged = tile + row * kRow + (block % 4 ^ row) * 32 + column * 4;
    return load_shared(exchanged + first_row * kRow + block / 4 * 128);
  }
};

// The left fragments of one 16-row block: lanes 0-15 address the rows, lanes 16-31 the same rows 16 bytes
// further.
__device__ __forceinline__ void load_rows(uint32_t (&a)[4], uint32_t tile, int first_row,
                                          int k_chunk) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix_x4(a, tile + RowTile::offset(first_row + lane % 16, k_chunk + lane / 16));
}

// The rows that a thread copies from; bit i of `exist`: is there one?
template <class T, int kRows>
struct CopiedRows {
  static_assert(kRows <= 32);
  const T* row[kRows];
  uint32_t exist = 0;
  __device__ __forceinline__ void set(int i, bool exists, const T* from) {
    row[i] = from;
    exist |= uint32_t{exists} << i;
  }
};

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

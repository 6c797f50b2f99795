// The other kind of tile: C[32, 32] = A[32, K] B[K, panel] in AMX tiles, two by two, for dtypes that have them.
//
// B is the same panel that vectors stream (packed_layout.h): 16 steps of it are two tiles, side by side. A must
// come in tiles, which take no pointers to rows, so rows are gathered once for all panels they are multiplied
// with, or stored that way by whoever computes them:
//   A[rows / 32][K / 32][2 tiles][16 rows][32]       K padded with zeros, the last block with whatever
// All of K goes by at once, so that sums are stored once. A and B then come from L2, half a line of each a
// cycle; asking for B in L1 brings 0.67 instead of 0.58 of what the tiles could do (blocks of K of 256, with sums
// loaded and stored for each: 0.69; everything in L1: 0.81 to 0.88; B from L3: 0.48 to 0.55, whatever is asked
// for ahead).
#pragma once

#include <type_traits>

#include "amx.h"
#include "gemm_tile.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

#ifdef DSMOE_AMX
template <class T>
constexpr bool kHasTiles = std::is_same_v<T, bf16>;
#else
template <class T>
constexpr bool kHasTiles = false;
#endif

// So many rows are left to the vectors: reading B from memory takes them no longer (T = 8, about four rows
// each: tiles from two or three rows on take 4 to 11 % less than from five on; T = 2 and 4: no difference).
constexpr int64_t kVectorRows = 2;
// Whether all rows of an expert are multiplied in tiles. It hangs on nothing else, so that bits do not either.
template <class T>
constexpr bool in_tiles(int64_t rows) {
  return kHasTiles<T> && rows > kVectorRows;
}
// Rows of sums at once.
template <class T>
constexpr int kMostRows = kHasTiles<T> ? kBlockRows : kMaxRows;
// Where an expert's rows may be cut between two items.
template <class T>
constexpr int64_t row_unit(int64_t rows) {
  return in_tiles<T>(rows) ? kBlockRows : 2;
}

constexpr int64_t kTileTerms = 2 * kTileSteps, kTileSize = kTileRows * kTileTerms,
                  kBlockStep = 2 * kTileSize;
constexpr int64_t block_size(int64_t terms) {
  return ceil_div(terms, kTileTerms) * kBlockStep;
}
constexpr int64_t blocked_size(int64_t rows, int64_t terms) {
  return ceil_div(rows, kBlockRows) * block_size(terms);
}
// Within a block rows are kTileTerms elements apart.
constexpr int64_t blocked_at(int64_t row, int64_t term, int64_t terms) {
  return row / kBlockRows * block_size(terms) + term / kTileTerms * kBlockStep +
         row % kBlockRows * kTileTerms + term % kTileTerms;
}

// Calls f(first row, rows) for as few tiles, or blocks, as hold count rows.
template <class F>
DSMOE_INLINE void for_each_tile(int64_t count, bool in_blocks, F f) {
  if (!in_blocks) return for_each_tile(count, f);
  for (int64_t i = 0; i < count; i += kBlockRows) f(i, int(min_of<int64_t>(kBlockRows, count - i)));
}

// Rows `tokens` of a row-major matrix as blocks.
template <class T>
static void gather_blocks(const T* matrix, int64_t stride, int64_t terms, const int32_t* tokens,
                          int64_t rows, T* out) {
  constexpr int64_t kRun =
      8;  // lines of a row at a time: written 2 KiB apart, they fall into few sets
  const int64_t whole = terms / kTileTerms, rest = terms % kTileTerms;
  for (int64_t block = 0; block < rows; block += kBlockRows, out += block_size(terms)) {
    const int64_t count = min_of<int64_t>(kBlockRows, rows - block);
    for (int64_t first = 0; first < whole; first += kRun)
      for (int64_t r = 0; r < count; ++r) {
        const T* from = matrix + tokens[block + r] * stride + first * kTileTerms;
        T* to = out + first * kBlockStep + r * kTileTerms;
        for (int64_t i = min_of(kRun, whole - first); i > 0;
             --i, from += kTileTerms, to += kBlockStep)
          memcpy(to, from, kTileTerms * sizeof(T));
      }
    for (int64_t r = 0; rest && r < count; ++r) {
      T* to = out + whole * kBlockStep + r * kTileTerms;
      memcpy(to, matrix + tokens[block + r] * stride + whole * kTileTerms,
             size_t(rest) * sizeof(T));
      for (int64_t i = rest; i < kTileTerms; ++i) to[i] = T{};
    }
  }
}

#ifdef DSMOE_AMX
template <bool HasTwo>
DSMOE_INLINE void block_step(const bf16* a, const bf16* b) {
  tile_load(4, a, 64);
  tile_load(6, b, 128);
  tile_dot(0, 4, 6);
  tile_load(7, b + 32, 128);
  tile_dot(1, 4, 7);
  if constexpr (HasTwo) {
    tile_load(5, a + kTileSize, 64);
    tile_dot(2, 5, 6);
    tile_dot(3, 5, 7);
  }
}

template <bool HasTwo>
__attribute__((noinline)) static void block_product(const TileArgs<bf16>& args, const bf16* a,
                                                    float* c) {
  constexpr int64_t kStep = kColumns<bf16> * 2, kNearB = 4096 / sizeof(bf16);
  tile_fence();
  tile_zero(0);
  tile_zero(1);
  tile_zero(2);
  tile_zero(3);
  const bf16* b = args.b;
  const int64_t whole = args.steps / kTileSteps * kTileSteps;
  for (int64_t s = 0; s < whole; s += kTileSteps, a += kBlockStep) {
#pragma GCC unroll 32
    for (int i = 0; i < kTileSteps * kStep; i += 32) __builtin_prefetch(b + kNearB + i, 0, 3);
    if (args.ahead) Ahead::fetch(*args.ahead, args.ahead_lines);
    block_step<HasTwo>(a, b);
    b += kTileSteps * kStep;
    if ((s + kTileSteps) % kBlockSteps == 0)
      b += s + kTileSteps + kBlockSteps <= args.steps ? args.skip : args.last_skip;
  }
  if (whole < args.steps) {  // zeros for what is missing in the last two tiles
    alignas(64) bf16 rest[kTileSteps * kStep] = {};
    memcpy(rest, b, size_t((args.steps - whole) * kStep) * sizeof(bf16));
    tile_fence();
    block_step<HasTwo>(a, rest);
  }
  tile_store(0, c, kBlockRows * 4);
  tile_store(1, c + 16, kBlockRows * 4);
  if constexpr (HasTwo) {
    tile_store(2, c + kTileRows * kBlockRows, kBlockRows * 4);
    tile_store(3, c + kTileRows * kBlockRows + 16, kBlockRows * 4);
  }
  tile_fence();
}
#endif

// One panel: c, 32 x 32, is A's block times the B of args.
template <class T>
DSMOE_INLINE void multiply_block([[maybe_unused]] const TileArgs<T>& args,
                                 [[maybe_unused]] const AType<T>* a, [[maybe_unused]] int rows,
                                 [[maybe_unused]] CType<T>* c) {
#ifdef DSMOE_AMX
  if constexpr (kHasTiles<T>)
    rows > kTileRows ? block_product<true>(args, a, c) : block_product<false>(args, a, c);
#endif
}

// A block of sums, rounded to rows of out, of which `width` columns exist.
template <class T>
static void round_rows(const CType<T>* c, int rows, T* out, int64_t stride, int64_t width,
                       bool stream) {
  for (int r = 0; r < rows; ++r, c += kColumns<T>, out += stride) {
    if (width >= kColumns<T>) {
      store_both(out, load(c), load(c + kLanes<T>), stream);
      continue;
    }
    T row[kColumns<T>];
    store_both(row, load(c), load(c + kLanes<T>), false);
    memcpy(out, row, size_t(width) * sizeof(T));
  }
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

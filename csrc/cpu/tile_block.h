// The other kind of tile: C[32, 32] = A[32, K] B[K, panel] in AMX tiles, two by two, for dtypes that have them.
//
// B is the same panel that vectors stream (packed_layout.h): 16 steps of it are two tiles, side by side. A must
// come in tiles, which take no pointers to rows, so rows are gathered once for all panels they are multiplied
// with, or stored that way by whoever computes them:
//   A[rows / 32][K / 32][2 tiles][16 rows][32]       K padded with zeros, the last block with whatever
// A panel stays in L1 while every block of A is multiplied with it; A comes from L2 past L1 (tile_stream), out of which
// it would drive the panel. Beyond kWholeSteps a panel goes by in runs of 256 of K, and sums are loaded and stored once
// a run. Bits are the same: a sum that is stored and loaded again is what it was.
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

constexpr std::true_type kYes;
constexpr std::false_type kNo;

#ifdef DSMOE_AMX
template <bool HasTwo>
DSMOE_INLINE void block_step(const bf16* a, const bf16* b) {
  tile_stream(4, a, 64);
  tile_load(6, b, 128);
  tile_dot(0, 4, 6);
  tile_load(7, b + 32, 128);
  tile_dot(1, 4, 7);
  if constexpr (HasTwo) {
    tile_stream(5, a + kTileSize, 64);
    tile_dot(2, 5, 6);
    tile_dot(3, 5, 7);
  }
}

// c (+)= a b for a run of K, and between(done, steps) after each step. Asks: B is not in L1 yet, so every step asks
// for the next one's, the last one for what begins at next (2 KiB ahead 14.2 GB/s of 17.6 that memory gives, 4 KiB
// and more 12.8, nothing 11.2).
template <bool HasTwo, bool Asks, class F>
__attribute__((noinline)) static void block_run(const TileArgs<bf16>& args, const bf16* a,
                                                const bf16* b, int64_t steps, const bf16* next,
                                                bool accumulate, float* c, F between) {
  constexpr int64_t kStep = PackedPanels<bf16>::kStep, kTileStep = kTileSteps * kStep;
  constexpr int kLower = kTileRows * kBlockRows;
  tile_fence();
  if (accumulate) {
    tile_load(0, c, kBlockRows * 4);
    tile_load(1, c + 16, kBlockRows * 4);
    if constexpr (HasTwo) {
      tile_load(2, c + kLower, kBlockRows * 4);
      tile_load(3, c + kLower + 16, kBlockRows * 4);
    }
  } else {
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
  }
  const int64_t all = ceil_div(steps, kTileSteps);
  int64_t done = 0;
  for (int64_t left = steps; left > 0;) {  // a part of B that lies in one piece
    const int64_t here = min_of(left, kBlockSteps), whole = here / kTileSteps;
    left -= here;
    const bf16* const after =
        left == 0 ? next : b + here * kStep + (left >= kBlockSteps ? args.skip : args.last_skip);
    for (int64_t i = 0; i < whole; ++i, a += kBlockStep, b += kTileStep) {
      if constexpr (Asks) {
        const bf16* ask = i + 1 < whole ? b + kTileStep : after;
#pragma GCC unroll 32
        for (int j = 0; j < kTileStep; j += 32) __builtin_prefetch(ask + j, 0, 3);
      }
      if (args.ahead) Ahead::fetch(*args.ahead, args.ahead_lines);
      block_step<HasTwo>(a, b);
      between(++done, all);
    }
    if (whole * kTileSteps < here) {  // zeros for what is missing in the last two tiles
      alignas(64) bf16 rest[kTileStep] = {};
      memcpy(rest, b, size_t((here - whole * kTileSteps) * kStep) * sizeof(bf16));
      tile_fence();
      block_step<HasTwo>(a, rest);
      between(++done, all);
    }
    b = after;
  }
  tile_store(0, c, kBlockRows * 4);
  tile_store(1, c + 16, kBlockRows * 4);
  if constexpr (HasTwo) {
    tile_store(2, c + kLower, kBlockRows * 4);
    tile_store(3, c + kLower + 16, kBlockRows * 4);
  }
  tile_fence();
}
#endif

// Beyond so many steps of K a panel goes by in runs.
constexpr int64_t kWholeSteps = 3 * kBlockSteps;
// Blocks that are multiplied with a run before the next one comes: 48 KiB of sums.
constexpr int64_t kMostBlocks = 12;
template <class T>
struct BlockSums {
  alignas(64) CType<T> of[kMostBlocks][kBlockRows][kColumns<T>];
};

// Blocks of A, a_block elements apart, times the panel of args: consume(first row, rows, sums) for each, kUnit rows or
// more after steps of the next one, so that vectors and tiles work at the same time. A panel of several runs goes by
// once for every even share of kMostBlocks blocks.
template <int kUnit, class T, class F>
DSMOE_INLINE void for_each_block([[maybe_unused]] const TileArgs<T>& args,
                                 [[maybe_unused]] const AType<T>* a,
                                 [[maybe_unused]] int64_t a_block, [[maybe_unused]] int64_t rows,
                                 [[maybe_unused]] F consume) {
#ifdef DSMOE_AMX
  if constexpr (kHasTiles<T>) {
    const int64_t blocks = ceil_div(rows, kBlockRows);
    const bool is_one_run = args.steps <= kWholeSteps;
    const int64_t shares = is_one_run ? 1 : ceil_div(blocks, kMostBlocks);
    const int64_t run_steps = is_one_run ? kWholeSteps : kBlockSteps;
    BlockSums<T> sums;
    const auto rows_of = [&](int64_t i) {
      return int(min_of<int64_t>(kBlockRows, rows - i * kBlockRows));
    };
    for (int64_t share = 0; share < shares; ++share) {
      const int64_t begin = blocks * share / shares, end = blocks * (share + 1) / shares;
      const auto of = [&](int64_t i) { return sums.of[is_one_run ? i % 2 : i - begin]; };
      const T* b = args.b;
      for (int64_t step = 0; step < args.steps; step += run_steps) {
        const int64_t steps = min_of(run_steps, args.steps - step),
                      left = args.steps - step - steps;
        const T* next = b + steps * PackedPanels<T>::kStep;
        if (left > 0) next += left >= kBlockSteps ? args.skip : args.last_skip;
        for (int64_t i = begin; i < end; ++i) {
          int64_t consumed = left == 0 && i > begin ? 0 : kBlockRows;
          const auto between = [&](int64_t done, int64_t all) {
            const int64_t to = kBlockRows * done / all / kUnit * kUnit;
            if (consumed >= to) return;
            consume((i - 1) * kBlockRows + consumed, int(to - consumed), of(i - 1) + consumed);
            consumed = to;
          };
          const auto run = [&](auto has_two, auto asks) {
            block_run<has_two(), asks()>(args, a + i * a_block + step / kTileSteps * kBlockStep, b,
                                         steps, next, step > 0, of(i)[0], between);
          };
          const bool asks = i == begin;
          if (rows_of(i) > kTileRows)
            asks ? run(kYes, kYes) : run(kYes, kNo);
          else
            asks ? run(kNo, kYes) : run(kNo, kNo);
        }
        b = next;
      }
      consume((end - 1) * kBlockRows, rows_of(end - 1), of(end - 1));
    }
  }
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

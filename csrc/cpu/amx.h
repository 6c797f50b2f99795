// The tile layer: AMX, or the same in scalar code. The only file that knows its instructions.
//
// A tile is 16 rows of 64 bytes. tile_dot(c, a, b) adds to c, 16 x 16 fp32, the product of a, 16 rows of
// 32 bf16, and b, 16 pairs of rows of K interleaved over 16 columns: half a step-run of our panels
// (packed_layout.h), at a stride of 128 bytes. Numbers of tiles are literals, hence macros.
//
//   __AMX_BF16__         the instructions
//   DSMOE_EMULATE_AMX    thread-local arrays, for machines without them and for sanitizers, which do not
//                        see what a tile loads
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) || defined(DSMOE_EMULATE_AMX)
#define DSMOE_AMX
#endif

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

// Rows that a tile multiplies, pairs of K it consumes, and rows of a block of two tiles.
constexpr int kTileRows = 16, kTileSteps = 16, kBlockRows = 2 * kTileRows;

#if defined(DSMOE_EMULATE_AMX)
struct EmulatedTile {
  uint8_t row[kTileRows][64];
};
static thread_local EmulatedTile emulated_tiles[8];

static inline void emulated_load(int tile, const void* from, int64_t stride) {
  for (int r = 0; r < kTileRows; ++r)
    memcpy(emulated_tiles[tile].row[r], (const char*)from + r * stride, 64);
}
static inline void emulated_store(int tile, void* to, int64_t stride) {
  for (int r = 0; r < kTileRows; ++r)
    memcpy((char*)to + r * stride, emulated_tiles[tile].row[r], 64);
}
// In the instruction's order: even and odd terms of K apart, from zero, then their sum onto c.
static inline void emulated_dot(int c, int a, int b) {
  for (int m = 0; m < kTileRows; ++m) {
    bf16 left[2 * kTileSteps];
    float sums[16];
    memcpy(left, emulated_tiles[a].row[m], 64);
    memcpy(sums, emulated_tiles[c].row[m], 64);
    float even[16] = {}, odd[16] = {};
    for (int k = 0; k < kTileSteps; ++k) {
      bf16 right[32];
      memcpy(right, emulated_tiles[b].row[k], 64);
      for (int n = 0; n < 16; ++n) {
        even[n] += widen(left[2 * k]) * widen(right[2 * n]);
        odd[n] += widen(left[2 * k + 1]) * widen(right[2 * n + 1]);
      }
    }
    for (int n = 0; n < 16; ++n) sums[n] += even[n] + odd[n];
    memcpy(emulated_tiles[c].row[m], sums, 64);
  }
}
#define tile_zero(tile) emulated_tiles[tile] = {}
#define tile_load(tile, from, stride) emulated_load(tile, from, stride)
#define tile_stream(tile, from, stride) emulated_load(tile, from, stride)
#define tile_store(tile, to, stride) emulated_store(tile, to, stride)
#define tile_dot(c, a, b) emulated_dot(c, a, b)
DSMOE_INLINE void tile_fence() {}
struct TileState {
  explicit TileState(bool) {}
};
#elif defined(DSMOE_AMX)
#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, from, stride) _tile_loadd(tile, from, stride)
#define tile_stream(tile, from, stride) _tile_stream_loadd(tile, from, stride)
#define tile_store(tile, to, stride) _tile_stored(tile, to, stride)
#define tile_dot(c, a, b) _tile_dpbf16ps(c, a, b)
// GCC's intrinsics say nothing about memory: without this it may drop stores that only a tile reads.
DSMOE_INLINE void tile_fence() {
  asm volatile("" ::: "memory");
}
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
// All eight tiles at their full size: smaller operands are padded with zeros, so that no tile is ever
// configured anew, which would clear all of them. Static: a compiler may drop stores to a local one,
// of which it sees no reader.
DSMOE_INLINE const TileConfig& full_tiles() {
  static constexpr TileConfig kFull = {
      1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  return kFull;
}
// Tiles of a thread, configured while it multiplies. Released after it, they cost no context switch 8 KiB;
// the configuration of whoever called us comes back, without what was in his tiles.
class TileState {
 public:
  explicit TileState(bool is_used) : is_used_(is_used) {
    if (!is_used_) return;
    asm volatile("sttilecfg %0" : "=m"(before_));
    load(full_tiles());
  }
  ~TileState() {
    if (!is_used_) return;
    if (before_.palette)
      load(before_);
    else
      _tile_release();
  }
  TileState(const TileState&) = delete;
  TileState& operator=(const TileState&) = delete;

 private:
  // The intrinsic names 8 of the 64 bytes as its operand.
  static void load(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
  const bool is_used_;
  TileConfig before_;
};
#else
struct TileState {
  explicit TileState(bool) {}
};
#endif

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

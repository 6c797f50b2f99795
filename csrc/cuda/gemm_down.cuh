// down: y[chunk of 256 tokens, 128 columns] = sum over e of a[tokens of e] Wd_e                  see expert_mlp_fwd.cu
//
//   rows     tokens that are active for the expert, gathered   [128, S_e]
//   columns  of Wd_e, the sum running down its rows            [S_e, 128]
//   result   added to a strip that only this CTA touches       [256, 128] fp32
//
// The backward uses it for dx = dg Wg + du Wu: two sources, one after the other.
#pragma once

#include "cuda/gemm_gate_up.cuh"  // live_blocks

namespace dsmoe::cuda {

struct DownTile {
  static constexpr int kTileN = 128;
  using Depth = DepthTile<kTileN>;
  static constexpr int kWarpsM = 2, kWarpsN = 2;
  static constexpr int kRowBlocks = kTileM / 16 / kWarpsM;  // 4
  static constexpr int kBlocks = kTileN / 8 / kWarpsN;      // 8
  static constexpr int kRowsBytes = kTileM * kRowBytes;
  static constexpr int kStageBytes = kRowsBytes + kTileK * kTileN * 2;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kCopiesA = kTileM / kCopyRows;
  static constexpr int kChunksPerDepth = kTileN / kChunk;  // 16
  static constexpr int kCopiesB = kTileK * kChunksPerDepth / kThreads;
  static constexpr int kStripFloats = kTokensPerChunk * kTileN;
  static_assert(kSharedBytes <= 48 << 10, "two CTAs per SM, and no opt-in needed");
  static_assert(kTileK == kWarp, "a lane per row of the sum");
};

using DownSums = float[DownTile::kRowBlocks][DownTile::kBlocks][4];

template <class T>
__device__ __forceinline__ void down_step(DownSums& sums, uint32_t stage, int warp_m, int warp_n,
                                          int live) {
  using C = DownTile;
  const int lane = threadIdx.x % kWarp;
  const uint32_t depth_tile = stage + C::kRowsBytes;
#pragma unroll
  for (int k_chunk = 0; k_chunk < kChunksPerRow; k_chunk += 2) {
    uint32_t a[C::kRowBlocks][4];
#pragma unroll
    for (int i = 0; i < C::kRowBlocks; ++i) {
      if (i < live) load_rows(a[i], stage, (i * C::kWarpsM + warp_m) * 16, k_chunk);
    }
#pragma unroll
    for (int j = 0; j < C::kBlocks; j += 2) {
      // matrices: block j, low and high k; block j + 1, low and high k
      const int k = k_chunk * kChunk + lane % 16;
      uint32_t b[4];
      ldmatrix_x4_trans(
          b, depth_tile + DownTile::Depth::offset(k, warp_n * C::kBlocks + j + lane / 16));
#pragma unroll
      for (int i = 0; i < C::kRowBlocks; ++i) {
        if (i >= live) continue;
        mma(sums[i][j], a[i], b[0], b[1], T());
        mma(sums[i][j + 1], a[i], b[2], b[3], T());
      }
    }
  }
}

// A chunk of tokens and a strip of columns: what a CTA sums over all experts.
struct DownUnit {
  int64_t index, chunk;
  int first_column;
  int tokens;
};

// The units of this CTA, of so many chunks each.
template <int kColumns>
class DownUnits {
 public:
  template <class T>
  __device__ explicit DownUnits(const PassArgs<T>& args, int chunks = 1)
      : chunks_(chunks),
        num_tokens_(args.num_tokens),
        strips_(static_cast<int>(ceil_div<int64_t>(args.hidden_size, kColumns))),
        num_units_(ceil_div<int64_t>(args.lists.tables.num_chunks, chunks) * strips_),
        index_(blockIdx.x) {}

  __device__ bool next(DownUnit& unit) {
    if (index_ >= num_units_) return false;
    unit.index = index_;
    const int64_t row = index_ / strips_;
    unit.chunk = row * chunks_;
    unit.first_column = static_cast<int>(index_ - row * strips_) * kColumns;
    const int64_t left = num_tokens_ - unit.chunk * kTokensPerChunk;
    const int tokens = chunks_ * kTokensPerChunk;
    unit.tokens = static_cast<int>(left < tokens ? left : tokens);
    index_ += gridDim.x;
    return true;
  }

 private:
  int chunks_;
  int64_t num_tokens_;
  int strips_;
  int64_t num_units_, index_;
};

// Row of a span's tile -> token within the chunk, or -1.
template <class T>
__device__ __forceinline__ int token_of_row(const PassArgs<T>& args, const DownUnit& unit,
                                            const SpanIterator::Span& span, int row) {
  const int pair = span.pairs.begin + row;
  if (pair >= span.pairs.end) return -1;
  if (span.all_tokens) return pair;
  return static_cast<int>(args.lists.token_idx[pair] - unit.chunk * kTokensPerChunk);
}

// Adds the products of 128 rows of a span to the strip.
template <class T>
__device__ void down_tile(const PassArgs<T>& args, const SumSource<T>& source, const DownUnit& unit,
                          const SpanIterator::Span& span, int first_row, uint32_t base,
                          float* strip) {
  using C = DownTile;
  const int t = threadIdx.x, lane = t % kWarp;
  const int warp_m = t / kWarp / C::kWarpsN, warp_n = t / kWarp % C::kWarpsN;
  const T* rows = source.rows + unit.chunk * kTokensPerChunk * args.width;

  const T* from[C::kCopiesA];  // the rows that this thread copies, null beyond the end
  const int chunk = t % kChunksPerRow, copy_row = t / kChunksPerRow;
#pragma unroll
  for (int i = 0; i < C::kCopiesA; ++i) {
    const int token = token_of_row(args, unit, span, first_row + copy_row + i * kCopyRows);
    from[i] = token >= 0 ? rows + token * args.width + span.first_column : nullptr;
  }
  const int depth_chunk = t % C::kChunksPerDepth;
  const int column = unit.first_column + depth_chunk * kChunk;
  const bool has_column = column < args.hidden_size;

  // Lane l looks up which row of Wd is term l of the next step's sum; one step ahead, because the
  // copies need the answer at once.
  auto row_of_term = [&](int term) {
    return term < span.end_column ? args.row_of_column[term] : -1;
  };
  int row_ahead = row_of_term(span.first_column + lane);
  auto load = [&](int stage, int step) {
    const uint32_t to = base + stage * C::kStageBytes;
    const int row = row_ahead;
    const int k = step * kTileK;
    row_ahead = row_of_term(span.first_column + k + kTileK + lane);
    const bool in_expert = __shfl_sync(kAllLanes, row, chunk * kChunk) >= 0;
#pragma unroll
    for (int i = 0; i < C::kCopiesA; ++i) {
      const bool valid = in_expert && from[i] != nullptr;
      cp_async_16(to + RowTile::offset(copy_row + i * kCopyRows, chunk),
                  valid ? from[i] + k + chunk * kChunk : source.rows, valid);
    }
#pragma unroll
    for (int i = 0; i < C::kCopiesB; ++i) {
      const int term = t / C::kChunksPerDepth + i * (kThreads / C::kChunksPerDepth);
      const int64_t weights_row = __shfl_sync(kAllLanes, row, term);
      const bool valid = weights_row >= 0 && has_column;
      cp_async_16(to + C::kRowsBytes + DownTile::Depth::offset(term, depth_chunk),
                  source.weights + (valid ? weights_row * args.hidden_size + column : 0), valid);
    }
  };

  DownSums sums{};
  const int live = live_blocks<C::kWarpsM>(span.pairs.count() - first_row, warp_m);
  const int terms = span.end_column - span.first_column;
  pipeline(ceil_div(terms, kTileK), load, [&](int stage) {
    down_step<T>(sums, base + stage * C::kStageBytes, warp_m, warp_n, live);
  });

  // the pipeline's barriers stand between this expert's additions and the previous expert's
#pragma unroll
  for (int i = 0; i < C::kRowBlocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + (i * C::kWarpsM + warp_m) * 16 + half * 8 + lane / 4;
      const int token = token_of_row(args, unit, span, row);
      if (token < 0) continue;
      float* out = strip + token * C::kTileN + warp_n * C::kBlocks * 8 + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < C::kBlocks; ++j) {
        float2* sum = reinterpret_cast<float2*>(out + j * 8);
        const float2 before = *sum;
        *sum = float2{before.x + sums[i][j][half * 2], before.y + sums[i][j][half * 2 + 1]};
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    down_kernel(const __grid_constant__ PassArgs<T> args) {
  using C = DownTile;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const bool is_whole = args.turn.is_first && args.turn.is_last;
  DownUnits<C::kTileN> units(args);
  DownUnit unit;
  while (units.next(unit)) {
    // Four neighbouring columns per thread, zeroed here; the pipeline's barriers come before the sums.
    constexpr int kQuads = C::kTileN / 4;
    const int num_quads = unit.tokens * kQuads;
    float* strip = args.strips + (is_whole ? blockIdx.x : unit.index) * C::kStripFloats;
    float4* quads = reinterpret_cast<float4*>(strip);
    for (int i = threadIdx.x; i < num_quads && args.turn.is_first; i += kThreads)
      quads[i] = float4{};
    for (int s = 0; s < args.num_sources; ++s) {
      const SumSource<T> source = args.sources[s];
      SpanIterator spans(args.lists, args.expert_offsets, args.expert_columns, args.num_experts,
                         unit.chunk);
      SpanIterator::Span span;
      while (spans.next(span, unit.tokens)) {
        for (int row = 0; row < span.pairs.count(); row += kTileM) {
          down_tile(args, source, unit, span, row, base, strip);
        }
      }
    }
    __syncthreads();
    // the same thread as above: neither y nor the next unit's zeros need a barrier
    for (int i = threadIdx.x; i < num_quads && args.turn.is_last; i += kThreads) {
      const int column = unit.first_column + i % kQuads * 4;
      if (column >= args.hidden_size) continue;
      const int64_t token = unit.chunk * kTokensPerChunk + i / kQuads;
      const float4 sum = quads[i];
      __stcg(reinterpret_cast<uint2*>(args.y + token * args.hidden_size + column),
             uint2{pack(sum.x, sum.y, T()), pack(sum.z, sum.w, T())});
    }
  }
}

}  // namespace dsmoe::cuda

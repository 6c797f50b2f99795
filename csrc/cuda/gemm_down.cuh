// down: y[chunk of 256 tokens, 128 columns] = sum over e of a[tokens of e] Wd_e                  see expert_mlp_fwd.cu
//
//   rows     tokens that are active for the expert, gathered   [128, S_e]
//   columns  of Wd_e, the sum running down its rows            [S_e, 128]
//   result   added to a strip that only this CTA touches       [256, 128] fp32: of y itself, if that is fp32
//
// A tile's sums start from what the strip holds. A thread reads all of its own at once while the first copies
// are on their way, and only writes when the tile is done.
//
// The backward uses it for dx = dg Wg + du Wu: two sources make one sum of twice the terms, so that the
// strip is read and written once, not twice.
// Few tokens make few units: then several CTAs share one, each with a part of every expert's neurons.
#pragma once

#include "cuda/gemm_gate_up.cuh"  // live_blocks
#include "cuda/last_to_arrive.cuh"

namespace dsmoe::cuda {

struct DownTile {
  static constexpr int kTileN = 128;
  static constexpr int kWarpsM = 2, kWarpsN = 2;
  static constexpr int kRowBlocks = kTileM / 16 / kWarpsM;  // 4
  static constexpr int kBlocks = kTileN / 8 / kWarpsN;      // 8
  static constexpr int kRowsBytes = kTileM * kRowBytes;
  static constexpr int kDepthBytes = kRowBytes * kTileN;
  static constexpr int kStageBytes = kRowsBytes + kDepthBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kCopiesA = kTileM / kCopyRows;
  static constexpr int kCopiesB = kDepthBytes / 16 / kThreads;
  static constexpr int kStripFloats = kTokensPerChunk * kTileN;
  static_assert(kSharedBytes <= 48 << 10, "two CTAs per SM, and no opt-in needed");
};

using DownSums = float[DownTile::kRowBlocks][DownTile::kBlocks][4];

template <class T>
__device__ __forceinline__ void down_step(DownSums& sums, uint32_t stage, int warp_m, int warp_n,
                                          int live) {
  using C = DownTile;
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
      uint32_t b[4];
      DepthTile<T, C::kTileN>::load_right(b, depth_tile, k_chunk * kNumbers<T>,
                                          warp_n * C::kBlocks + j);
      round_operands(b, T());
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
  int part;
  int first_column;
  int tokens;
};

// The units of this CTA, of so many chunks each, or its parts of them, if there can be several.
template <int kColumns, bool kInParts = true>
class DownUnits {
 public:
  template <class T>
  __device__ explicit DownUnits(const PassArgs<T>& args, int chunks = 1)
      : chunks_(chunks),
        parts_(kInParts ? args.parts : 1),
        num_tokens_(args.num_tokens),
        strips_(static_cast<int>(ceil_div<int64_t>(args.hidden_size, kColumns))),
        num_units_(ceil_div<int64_t>(args.lists.tables.num_chunks, chunks) * strips_ * parts_),
        index_(blockIdx.x) {}

  __device__ bool next(DownUnit& unit) {
    if (index_ >= num_units_) return false;
    unit.index = index_;
    // parts are few and of few units: then 32 bits hold the index
    const int64_t whole = parts_ == 1 ? index_ : static_cast<int>(index_) / parts_;
    unit.part = static_cast<int>(index_ - whole * parts_);
    const int64_t row = whole / strips_;
    unit.chunk = row * chunks_;
    unit.first_column = static_cast<int>(whole - row * strips_) * kColumns;
    const int64_t left = num_tokens_ - unit.chunk * kTokensPerChunk;
    const int tokens = chunks_ * kTokensPerChunk;
    unit.tokens = static_cast<int>(left < tokens ? left : tokens);
    index_ += gridDim.x;
    return true;
  }

 private:
  int chunks_, parts_;
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

__device__ __forceinline__ void add(float4& sum, const float4& other) {
  sum = {sum.x + other.x, sum.y + other.y, sum.z + other.z, sum.w + other.w};
}

// Is this CTA the last to finish its part of a unit, so that it adds all parts up? any_of: see there.
template <class T, class AnyOf>
__device__ __forceinline__ bool is_last_part(const PassArgs<T>& args, const DownUnit& unit,
                                             AnyOf any_of) {
  const int whole = static_cast<int>(unit.index) / args.parts;
  return is_last_to_arrive(&args.arrived[whole], args.parts, threadIdx.x == 0, any_of);
}

// Where a unit's sums are. Of half types in the workspace, all columns of them; of fp32 they are y.
struct Strip {
  float* sums;
  int64_t stride;
  int columns;
};
template <class T>
__device__ __forceinline__ Strip strip_of(const PassArgs<T>& args, const DownUnit& unit) {
  const bool is_whole = args.turn.is_first && args.turn.is_last && args.parts == 1;
  const int64_t index = is_whole ? blockIdx.x : unit.index;
  return {args.strips + index * DownTile::kStripFloats, DownTile::kTileN, DownTile::kTileN};
}
__device__ __forceinline__ Strip strip_of(const PassArgs<float>& args, const DownUnit& unit) {
  const int64_t first = unit.chunk * kTokensPerChunk * args.hidden_size + unit.first_column;
  return {args.y + first, args.hidden_size, static_cast<int>(args.hidden_size) - unit.first_column};
}

// Adds the products of 128 rows of a span to the strip.
template <class T>
__device__ void down_tile(const PassArgs<T>& args, const DownUnit& unit,
                          const SpanIterator::Span& span, int first_row, uint32_t base,
                          const Strip& strip) {
  using C = DownTile;
  const int t = threadIdx.x, lane = t % kWarp;
  const int warp_m = t / kWarp / C::kWarpsN, warp_n = t / kWarp % C::kWarpsN;

  // In either source, where this thread's copies begin: 16 bytes times from[i] on, if bit i says so.
  uint32_t from[C::kCopiesA], exist = 0;
  const int chunk = t % kChunksPerRow, copy_row = t / kChunksPerRow;
#pragma unroll
  for (int i = 0; i < C::kCopiesA; ++i) {
    const int token = token_of_row(args, unit, span, first_row + copy_row + i * kCopyRows);
    from[i] = token * static_cast<uint32_t>(args.width / kNumbers<T>);
    exist |= uint32_t{token >= 0} << i;
  }
  const int64_t first_number =
      unit.chunk * kTokensPerChunk * args.width + span.first_column + chunk * int64_t{kNumbers<T>};
  using Depth = DepthTile<T, C::kTileN>;
  const int depth_chunk = t % Depth::kChunks;
  const int column = unit.first_column + depth_chunk * kNumbers<T>;
  const bool has_column = column < args.hidden_size;

  static_assert(kTileK<T> <= kWarp, "a lane per term");
  // Lane l looks up which row of the weights is term l of the next step's sum; one step ahead, because the
  // copies need the answer at once.
  auto row_of_term = [&](int term) {
    return term < span.end_column ? args.row_of_column[term] : -1;
  };
  const int steps = ceil_div(span.end_column - span.first_column, kTileK<T>);  // of a source
  // of the second source, if there is one: a step behind the last one is no step of it, and its row not read
  const int second = args.num_sources == 2 ? steps : INT32_MAX;
  auto within_source = [&](int step) { return step < second ? step : step - steps; };
  int row_ahead = row_of_term(span.first_column + lane);
  auto load = [&](int stage, int step) {
    const uint32_t to = base + stage * C::kStageBytes;
    const SumSource<T> source = args.sources[step < second ? 0 : 1];
    const int row = row_ahead;
    const int k = within_source(step) * kTileK<T>;
    row_ahead = row_of_term(span.first_column + within_source(step + 1) * kTileK<T> + lane);
    const uint32_t now = __shfl_sync(kAllLanes, row, chunk * kNumbers<T>) >= 0 ? exist : 0;
    const T* rows = source.rows + first_number + k;
#pragma unroll
    for (int i = 0; i < C::kCopiesA; ++i) {
      cp_async_16(to + RowTile::offset(copy_row + i * kCopyRows, chunk),
                  rows + uint64_t{from[i]} * kNumbers<T>, now >> i & 1);
    }
#pragma unroll
    for (int i = 0; i < C::kCopiesB; ++i) {
      const int term = t / Depth::kChunks + i * (kThreads / Depth::kChunks);
      const int64_t weights_row = __shfl_sync(kAllLanes, row, term);
      cp_async_16(to + C::kRowsBytes + Depth::offset(term, depth_chunk),
                  source.weights.first + weights_row * source.weights.stride + column,
                  weights_row >= 0 && has_column);
    }
  };

  // act(where in the strip two sums are, those two) for all that the thread has, of columns that exist. Written as
  // one number: the compiler would cut some pairs in two.
  DownSums sums{};
  auto for_each_pair = [&](auto act) {
#pragma unroll
    for (int i = 0; i < C::kRowBlocks; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first_row + (i * C::kWarpsM + warp_m) * 16 + half * 8 + lane / 4;
        const int token = token_of_row(args, unit, span, row);
        const int own = warp_n * C::kBlocks * 8 + lane % 4 * 2;
        float* at = strip.sums + token * strip.stride + own;
        const int columns = token < 0 ? 0 : strip.columns - own;
#pragma unroll
        for (int j = 0; j < C::kBlocks; ++j) {
          float* two = &sums[i][j][half * 2];
          if (j * 8 < columns) act(reinterpret_cast<float2*>(at + j * 8), two[0], two[1]);
        }
      }
    }
  };
  __syncthreads();  // the tile before, or the zeros, have been written
  for_each_pair([](const float2* sum, float& first, float& second) {
    const float2 before = *sum;
    first = before.x;
    second = before.y;
  });
  const int live = live_blocks<C::kWarpsM>(span.pairs.count() - first_row, warp_m);
  pipeline(args.num_sources * steps, load, [&](int stage) {
    down_step<T>(sums, base + stage * C::kStageBytes, warp_m, warp_n, live);
  });
  for_each_pair([](float2* sum, float first, float second) {
    uint64_t both;  // put together where the compiler cannot carry it through the loop
    asm("mov.b64 %0, {%1, %2};" : "=l"(both) : "f"(first), "f"(second));
    *reinterpret_cast<uint64_t*>(sum) = both;
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    down_kernel(const __grid_constant__ PassArgs<T> args) {
  using C = DownTile;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  DownUnits<C::kTileN> units(args);
  DownUnit unit;
  while (units.next(unit)) {
    // Four neighbouring columns per thread, zeroed here; a tile's barrier comes before it reads sums.
    constexpr int kQuads = C::kTileN / 4, kRows = kThreads / kQuads;
    const int first_token = threadIdx.x / kQuads, column = threadIdx.x % kQuads * 4;
    const Strip strip = strip_of(args, unit);
    auto sums_of = [&](int token) {
      return reinterpret_cast<float4*>(strip.sums + token * strip.stride + column);
    };
    if (args.turn.is_first && column < strip.columns) {
      for (int token = first_token; token < unit.tokens; token += kRows) *sums_of(token) = float4{};
    }
    SpanIterator spans(args.lists, args.expert_offsets, args.expert_columns, args.num_experts,
                       {unit.part, args.parts, kTileK<T>}, unit.chunk);
    SpanIterator::Span span;
    while (spans.next(span, unit.tokens)) {
      for (int row = 0; row < span.pairs.count(); row += kTileM) {
        down_tile(args, unit, span, row, base, strip);
      }
    }
    if constexpr (!kIsFloat<T>) {  // whose sums are y, and the next unit's are elsewhere
      __syncthreads();
      if (args.parts > 1 && !is_last_part(args, unit, AnyOfAll())) continue;
      // the same thread as above: neither y nor the next unit's zeros need a barrier
      T* y = args.y + unit.chunk * kTokensPerChunk * args.hidden_size + unit.first_column + column;
      if (!args.turn.is_last || unit.first_column + column >= args.hidden_size) continue;
      for (int token = first_token; token < unit.tokens; token += kRows) {
        float4 sum = *(sums_of(token) - unit.part * (DownTile::kStripFloats / 4));
        for (int part = 1; part < args.parts; ++part) {
          add(sum, *(sums_of(token) + (part - unit.part) * (DownTile::kStripFloats / 4)));
        }
        Neighbours<T, 4> out;
        out.set(0, sum.x, sum.y);
        out.set(1, sum.z, sum.w);
        out.store(y + token * args.hidden_size);
      }
    }
  }
}

}  // namespace dsmoe::cuda

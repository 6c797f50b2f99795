// The two GEMMs of the forward in fp32, by exact multiply-adds.           see expert_mlp_fwd.cu
//
// 64 x 64 outputs per CTA of 128 threads, 32 per thread, 16 terms of the sum per step. Operands lie in
// shared memory with the term outermost; rows come from global memory along their terms and are
// transposed on their way. While a step is computed, registers fetch the next.
//
// Bank conflicts. Blocks of 8 rows are exchanged by (term / 4) ^ term, so that neither the transposing
// stores (rows x groups of 4 terms) nor vectors of one term meet one.
//
// T is float; templates because two sources include them.
#pragma once

#include "cuda/gemm_down.cuh"  // DownUnits, token_of_row

namespace dsmoe::cuda {

struct FfmaTile {
  static constexpr int kTileM = 64, kTileN = 64, kTerms = 16;
  static constexpr int kGroups = kTerms / 4;                   // groups of 4 terms, 16 bytes
  static constexpr int kCopies = kTileM * kGroups / kThreads;  // vectors a thread copies: 2
  static constexpr int kMatrixFloats = kTerms * kTileM;
  static_assert(kTileM == kTileN, "one layout for both operands");
  // what a thread has of the 64 x 64
  static constexpr int kRows = 8, kNeighbours = 4, kThreadsN = kTileN / kNeighbours;
  static_assert(kTileM / kRows * kThreadsN == kThreads);

  static __device__ __forceinline__ int at(int term, int row) {
    return term * kTileM + (row ^ ((term / 4 ^ term) % 4) * 8);
  }
  static __device__ __forceinline__ int row(int i) { return threadIdx.x / kThreadsN * kRows + i; }
  static __device__ __forceinline__ int column() { return threadIdx.x % kThreadsN * kNeighbours; }
};
using FfmaSums = float[FfmaTile::kRows][FfmaTile::kNeighbours];

__device__ __forceinline__ float component(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Adds a term's products: 3 vector loads for 32 multiply-adds.
__device__ __forceinline__ void add_term(FfmaSums& sums, const float* a, const float* b, int term) {
  using C = FfmaTile;
  const float4 low = *reinterpret_cast<const float4*>(a + C::at(term, C::row(0)));
  const float4 high = *reinterpret_cast<const float4*>(a + C::at(term, C::row(0)) + 4);
  const float4 columns = *reinterpret_cast<const float4*>(b + C::at(term, C::column()));
#pragma unroll
  for (int i = 0; i < C::kRows; ++i) {
    const float row = i < 4 ? component(low, i) : component(high, i - 4);
#pragma unroll
    for (int j = 0; j < C::kNeighbours; ++j) {
      sums[i][j] = fmaf(row, component(columns, j), sums[i][j]);
    }
  }
}

// A thread's neighbouring outputs, in one access.
__device__ __forceinline__ void store_quad(float* to, const float (&v)[4]) {
  __stcg(reinterpret_cast<float4*>(to), float4{v[0], v[1], v[2], v[3]});
}
__device__ __forceinline__ void add_quad(float* to, const float (&v)[4]) {
  auto* at = reinterpret_cast<float4*>(to);
  const float4 before = *at;
  *at = float4{before.x + v[0], before.y + v[1], before.z + v[2], before.w + v[3]};
}

// Rows along their terms: thread t copies group t % 4 of rows t / 4 and t / 4 + 32.
struct FfmaRows {
  const float* from[FfmaTile::kCopies];  // null: zeros
  float4 ahead[FfmaTile::kCopies];

  static __device__ __forceinline__ int row(int copy) {
    return threadIdx.x / FfmaTile::kGroups + copy * (kThreads / FfmaTile::kGroups);
  }
  static __device__ __forceinline__ int group() { return threadIdx.x % FfmaTile::kGroups; }

  __device__ __forceinline__ void fetch(int first_term, bool valid) {
#pragma unroll
    for (int i = 0; i < FfmaTile::kCopies; ++i) {
      const bool read = valid && from[i] != nullptr;
      const float* at = from[i] + first_term + group() * 4;
      ahead[i] = read ? *reinterpret_cast<const float4*>(at) : float4{};
    }
  }
  __device__ __forceinline__ void store(float* matrix) const {
#pragma unroll
    for (int i = 0; i < FfmaTile::kCopies; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        matrix[FfmaTile::at(group() * 4 + j, row(i))] = component(ahead[i], j);
      }
    }
  }
};

// Matrices whose rows are terms already: thread t copies 4 columns of terms t / 16 and t / 16 + 8.
struct FfmaTerms {
  static constexpr int kQuads = FfmaTile::kTileN / 4;
  float4 ahead[FfmaTile::kCopies];

  static __device__ __forceinline__ int term(int copy) {
    return threadIdx.x / kQuads + copy * (kThreads / kQuads);
  }
  static __device__ __forceinline__ int column() { return threadIdx.x % kQuads * 4; }

  __device__ __forceinline__ void fetch(int copy, const float* from, bool valid) {
    ahead[copy] = valid ? *reinterpret_cast<const float4*>(from) : float4{};
  }
  __device__ __forceinline__ void store(float* matrix) const {
#pragma unroll
    for (int i = 0; i < FfmaTile::kCopies; ++i) {
      *reinterpret_cast<float4*>(matrix + FfmaTile::at(term(i), column())) = ahead[i];
    }
  }
};

// fetch(step) to registers, store(buffer) to shared memory, compute(buffer, term) for every term: two
// buffers, one barrier per step. Ends with a barrier.
template <class Fetch, class Store, class Compute>
__device__ __forceinline__ void ffma_pipeline(int num_steps, Fetch fetch, Store store,
                                              Compute compute) {
  fetch(0);
  for (int step = 0; step < num_steps; ++step) {
    store(step % 2);
    __syncthreads();
    if (step + 1 < num_steps) fetch(step + 1);
#pragma unroll
    for (int term = 0; term < FfmaTile::kTerms; ++term) compute(step % 2, term);
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gate_up_ffma_kernel(const __grid_constant__ PassArgs<T> args) {
  using C = FfmaTile;
  __shared__ __align__(16) float shared[2][3][C::kMatrixFloats];  // rows of x, of Wg, of Wu
  const int num_steps = static_cast<int>(ceil_div<int64_t>(args.hidden_size, C::kTerms));
  TileScheduler<C::kTileM, C::kTileN> scheduler(args.lists, args.expert_offsets, args.num_experts,
                                                args.group_size, 1, INT32_MAX);
  typename TileScheduler<C::kTileM, C::kTileN>::Tile tile;
  while (scheduler.next(tile)) {
    FfmaRows x, gate, up;
#pragma unroll
    for (int i = 0; i < C::kCopies; ++i) {
      const int row = FfmaRows::row(i), pair = tile.pairs.begin + row;
      const int64_t neuron = tile.first_row + row;
      const bool has_column = row < tile.columns;
      x.from[i] =
          pair < tile.pairs.end ? args.x + args.lists.token_idx[pair] * args.x_stride : nullptr;
      gate.from[i] = has_column ? args.gate_proj.at(tile.expert, neuron) : nullptr;
      up.from[i] = has_column ? args.up_proj.at(tile.expert, neuron) : nullptr;
    }
    FfmaSums gates{}, ups{};
    ffma_pipeline(
        num_steps,
        [&](int step) {
          const int term = step * C::kTerms;
          const bool valid = term + FfmaRows::group() * 4 < args.hidden_size;
          x.fetch(term, valid);
          gate.fetch(term, valid);
          up.fetch(term, valid);
        },
        [&](int buffer) {
          x.store(shared[buffer][0]);
          gate.store(shared[buffer][1]);
          up.store(shared[buffer][2]);
        },
        [&](int buffer, int term) {
          add_term(gates, shared[buffer][0], shared[buffer][1], term);
          add_term(ups, shared[buffer][0], shared[buffer][2], term);
        });

    const int64_t tile_column = args.expert_columns[tile.expert] + tile.column;
    const int columns =
        ceil_div(tile.columns, 4) * 4;  // zeros at the end, even of an infinite gate
    const int column = C::column();
    if (column >= columns) continue;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
      const int pair = tile.pairs.begin + C::row(i);
      if (pair >= tile.pairs.end) continue;
      const int64_t token = args.lists.token_idx[pair];
      const float weight = args.gates[token * args.num_experts + tile.expert];
      const auto &g = gates[i], &u = ups[i];
      float out[C::kNeighbours];
#pragma unroll
      for (int j = 0; j < C::kNeighbours; ++j) {
        const float a = args.exact.value(g[j]) * u[j];
        out[j] = column + j < tile.columns ? weight * a : 0.f;
      }
      store_quad(args.activations + token * args.width + tile_column + column, out);
      if (args.saved == nullptr) continue;
      float* saved = args.saved + token * 2 * args.intermediate_size + tile.first_row + column;
      store_saved(saved, g, tile.columns - column);
      store_saved(saved + args.intermediate_size, u, tile.columns - column);
    }
  }
}

// Adds the products of 64 rows of a span to y, which points to the unit's first token and column.
template <class T>
__device__ __forceinline__ void down_ffma_tile(const PassArgs<T>& args, const SumSource<T>& source,
                                               const DownUnit& unit, const SpanIterator::Span& span,
                                               int first_row,
                                               float (*shared)[2][FfmaTile::kMatrixFloats],
                                               float* y) {
  using C = FfmaTile;
  const float* rows = source.rows + unit.chunk * kTokensPerChunk * args.width;
  FfmaRows a;
  FfmaTerms weights;
#pragma unroll
  for (int i = 0; i < C::kCopies; ++i) {
    const int token = token_of_row(args, unit, span, first_row + FfmaRows::row(i));
    a.from[i] = token < 0 ? nullptr : rows + token * args.width + span.first_column;
  }
  auto row_of_column = [&](int c) { return c < span.end_column ? args.row_of_column[c] : -1; };
  const int64_t column = unit.first_column + FfmaTerms::column();
  FfmaSums sums{};
  ffma_pipeline(
      ceil_div(span.end_column - span.first_column, C::kTerms),
      [&](int step) {
        const int term = step * C::kTerms;
        // columns past an expert's end within 4 are zeros; beyond, nothing was written
        a.fetch(term, row_of_column(span.first_column + term + FfmaRows::group() * 4) >= 0);
#pragma unroll
        for (int i = 0; i < C::kCopies; ++i) {
          const int64_t row = row_of_column(span.first_column + term + FfmaTerms::term(i));
          weights.fetch(i, source.weights.first + row * source.weights.stride + column,
                        row >= 0 && column < args.hidden_size);
        }
      },
      [&](int buffer) {
        a.store(shared[buffer][0]);
        weights.store(shared[buffer][1]);
      },
      [&](int buffer, int term) { add_term(sums, shared[buffer][0], shared[buffer][1], term); });

  // the pipeline's barriers stand between this expert's additions and what was there before
  const int own = C::column();
  if (unit.first_column + own >= args.hidden_size) return;
#pragma unroll
  for (int i = 0; i < C::kRows; ++i) {
    const int token = token_of_row(args, unit, span, first_row + C::row(i));
    if (token >= 0) add_quad(y + token * args.hidden_size + own, sums[i]);
  }
}

// y itself is the strip that the CTA adds to.
template <class T>
__global__ void __launch_bounds__(kThreads)
    down_ffma_kernel(const __grid_constant__ PassArgs<T> args) {
  using C = FfmaTile;
  __shared__ __align__(16) float shared[2][2][C::kMatrixFloats];  // rows of a, columns of Wd
  constexpr int kQuads = C::kTileN / 4;
  DownUnits<C::kTileN> units(args);
  DownUnit unit;
  while (units.next(unit)) {
    float* y = args.y + unit.chunk * kTokensPerChunk * args.hidden_size + unit.first_column;
    for (int i = threadIdx.x; i < unit.tokens * kQuads && args.turn.is_first; i += kThreads) {
      if (unit.first_column + i % kQuads * 4 >= args.hidden_size) continue;
      *reinterpret_cast<float4*>(y + i / kQuads * args.hidden_size + i % kQuads * 4) = float4{};
    }
    for (int s = 0; s < args.num_sources; ++s) {
      SpanIterator spans(args.lists, args.expert_offsets, args.expert_columns, args.num_experts, {},
                         unit.chunk);
      SpanIterator::Span span;
      while (spans.next(span, unit.tokens)) {
        for (int row = 0; row < span.pairs.count(); row += C::kTileM) {
          down_ffma_tile(args, args.sources[s], unit, span, row, shared, y);
        }
      }
    }
  }
}

}  // namespace dsmoe::cuda

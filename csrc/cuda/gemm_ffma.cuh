// The two GEMMs of the forward in exact fp32: fused multiply-adds, no tensor cores.      see expert_mlp_fwd.cu
//
// 64 x 64 outputs per CTA of 128 threads, 8 x 4 per thread, 16 terms of the sum per step. Operands lie
// in shared memory with the term outermost, so that a thread reads its 8 rows and 4 columns of one term
// as 16-byte vectors: 4 loads for 64 multiply-adds in gate_up. Rows come from global memory along their
// terms; the transposing stores of a warp (8 rows x 4 groups of 4 terms) meet no bank conflict because
// blocks of 8 are exchanged by the group's number. While a step is computed, registers fetch the next.
#pragma once

#include "cuda/gemm_gate_up.cuh"

namespace dsmoe::cuda {

struct FfmaTile {
  static constexpr int kTileM = 64, kTileN = 64, kTerms = 16;
  static constexpr int kRows = 8, kColumns = 4;                // outputs of a thread
  static constexpr int kThreadsN = kTileN / kColumns;          // 16
  static constexpr int kGroups = kTerms / 4;                   // groups of 4 terms, 16 bytes
  static constexpr int kCopies = kTileM * kGroups / kThreads;  // vectors a thread copies: 2
  static constexpr int kMatrixFloats = kTerms * kTileM;
  static_assert(kTileM / kRows * kThreadsN == kThreads);

  static __device__ __forceinline__ int at(int term, int row) {
    return term * kTileM + (row ^ (term / 4 % 4) * 8);
  }
};

__device__ __forceinline__ float component(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
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

// sums += the products of a step: 8 rows of a, 4 columns of b.
__device__ __forceinline__ void ffma_step(float (&sums)[FfmaTile::kRows][FfmaTile::kColumns],
                                          const float* a, const float* b) {
  using C = FfmaTile;
  const int first_row = threadIdx.x / C::kThreadsN * C::kRows;
  const int first_column = threadIdx.x % C::kThreadsN * C::kColumns;
#pragma unroll
  for (int term = 0; term < C::kTerms; ++term) {
    const float4 low = *reinterpret_cast<const float4*>(a + C::at(term, first_row));
    const float4 high = *reinterpret_cast<const float4*>(a + C::at(term, first_row) + 4);
    const float4 column = *reinterpret_cast<const float4*>(b + C::at(term, first_column));
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
      const float row = i < 4 ? component(low, i) : component(high, i - 4);
#pragma unroll
      for (int j = 0; j < C::kColumns; ++j)
        sums[i][j] = fmaf(row, component(column, j), sums[i][j]);
    }
  }
}

// fetch(step) to registers, store(buffer) to shared memory, compute(buffer): two buffers, one barrier
// per step. Ends with a barrier.
template <class Fetch, class Store, class Compute>
__device__ __forceinline__ void ffma_pipeline(int num_steps, Fetch fetch, Store store,
                                              Compute compute) {
  fetch(0);
  for (int step = 0; step < num_steps; ++step) {
    store(step % 2);
    __syncthreads();
    if (step + 1 < num_steps) fetch(step + 1);
    compute(step % 2);
  }
  __syncthreads();
}

static __global__ void __launch_bounds__(kThreads)
    gate_up_ffma_kernel(const __grid_constant__ PassArgs<float> args) {
  using C = FfmaTile;
  __shared__ __align__(16) float shared[2][3][C::kMatrixFloats];  // rows of x, of Wg, of Wu
  const int num_steps = static_cast<int>(ceil_div<int64_t>(args.hidden_size, C::kTerms));
  TileScheduler<C::kTileM, C::kTileN> scheduler(args.lists, args.expert_offsets, args.num_experts,
                                                1, INT32_MAX);
  TileScheduler<C::kTileM, C::kTileN>::Tile tile;
  while (scheduler.next(tile)) {
    FfmaRows x, gate, up;
#pragma unroll
    for (int i = 0; i < C::kCopies; ++i) {
      const int row = FfmaRows::row(i), pair = tile.pairs.begin + row;
      const int64_t weights = (tile.first_row + row) * args.hidden_size;
      const bool has_column = row < tile.columns;
      x.from[i] =
          pair < tile.pairs.end ? args.x + args.lists.token_idx[pair] * args.x_stride : nullptr;
      gate.from[i] = has_column ? args.gate_proj + weights : nullptr;
      up.from[i] = has_column ? args.up_proj + weights : nullptr;
    }
    float gates[C::kRows][C::kColumns] = {}, ups[C::kRows][C::kColumns] = {};
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
        [&](int buffer) {
          ffma_step(gates, shared[buffer][0], shared[buffer][1]);
          ffma_step(ups, shared[buffer][0], shared[buffer][2]);
        });

    const int column = threadIdx.x % C::kThreadsN * C::kColumns;
    if (column >= tile.columns)
      continue;  // columns past the end within 4 are zeros, as the rows were
    const int first_column = args.expert_columns[tile.expert] + tile.column + column;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
      const int pair = tile.pairs.begin + threadIdx.x / C::kThreadsN * C::kRows + i;
      if (pair >= tile.pairs.end) continue;
      const int64_t token = args.lists.token_idx[pair];
      const float weight = args.gates[token * args.num_experts + tile.expert];
      float out[C::kColumns];
#pragma unroll
      for (int j = 0; j < C::kColumns; ++j) {
        out[j] = weight * (gates[i][j] / (1.f + expf(-gates[i][j])) * ups[i][j]);
      }
      __stcg(reinterpret_cast<float4*>(args.activations + token * args.width + first_column),
             float4{out[0], out[1], out[2], out[3]});
    }
  }
}

// y itself is the strip that the CTA adds to.
static __global__ void __launch_bounds__(kThreads)
    down_ffma_kernel(const __grid_constant__ PassArgs<float> args) {
  using C = FfmaTile;
  __shared__ __align__(16) float shared[2][2][C::kMatrixFloats];  // rows of a, columns of Wd
  constexpr int kQuads = C::kTileN / 4;
  const int t = threadIdx.x;
  const int strips = static_cast<int>(ceil_div<int64_t>(args.hidden_size, C::kTileN));
  const int64_t num_units = args.lists.tables.num_chunks * strips;
  for (int64_t index = blockIdx.x; index < num_units; index += gridDim.x) {
    const int64_t chunk = index / strips, first_token = chunk * kTokensPerChunk;
    const int first_output = static_cast<int>(index - chunk * strips) * C::kTileN;
    const int64_t left = args.num_tokens - first_token;
    const int tokens = static_cast<int>(left < kTokensPerChunk ? left : kTokensPerChunk);
    float* y = args.y + first_token * args.hidden_size + first_output;
    const float* activations = args.sources[0].rows + first_token * args.width;
    for (int i = t; i < tokens * kQuads; i += kThreads) {
      if (first_output + i % kQuads * 4 >= args.hidden_size) continue;
      *reinterpret_cast<float4*>(y + i / kQuads * args.hidden_size + i % kQuads * 4) = float4{};
    }
    SpanIterator spans(args.lists, args.expert_offsets, args.expert_columns, args.num_experts,
                       chunk);
    SpanIterator::Span span;
    while (spans.next(span, tokens)) {
      for (int first_row = 0; first_row < span.pairs.count(); first_row += C::kTileM) {
        auto token_of_row = [&](int row) {
          const int pair = span.pairs.begin + first_row + row;
          if (pair >= span.pairs.end) return -1;
          return span.all_tokens ? pair
                                 : static_cast<int>(args.lists.token_idx[pair] - first_token);
        };
        FfmaRows a;
#pragma unroll
        for (int i = 0; i < C::kCopies; ++i) {
          const int token = token_of_row(FfmaRows::row(i));
          a.from[i] = token < 0 ? nullptr : activations + token * args.width + span.first_column;
        }
        // Wd's rows already have the term outermost: thread t copies 4 columns of terms t / 16, + 8
        const int column = t % kQuads * 4;
        float4 ahead[C::kCopies];
        float sums[C::kRows][C::kColumns] = {};
        auto row_of_column = [&](int c) {
          return c < span.end_column ? args.row_of_column[c] : -1;
        };
        ffma_pipeline(
            ceil_div(span.end_column - span.first_column, C::kTerms),
            [&](int step) {
              const int term = step * C::kTerms;
              // columns past an expert's end within 4 are zeros; beyond, nothing was written
              a.fetch(term, row_of_column(span.first_column + term + FfmaRows::group() * 4) >= 0);
#pragma unroll
              for (int i = 0; i < C::kCopies; ++i) {
                const int own = term + t / kQuads + i * (kThreads / kQuads);
                const int64_t row = row_of_column(span.first_column + own);
                const bool valid = row >= 0 && first_output + column < args.hidden_size;
                const float* at =
                    args.sources[0].weights + row * args.hidden_size + first_output + column;
                ahead[i] = valid ? *reinterpret_cast<const float4*>(at) : float4{};
              }
            },
            [&](int buffer) {
              a.store(shared[buffer][0]);
#pragma unroll
              for (int i = 0; i < C::kCopies; ++i) {
                const int term = t / kQuads + i * (kThreads / kQuads);
                *reinterpret_cast<float4*>(&shared[buffer][1][C::at(term, column)]) = ahead[i];
              }
            },
            [&](int buffer) { ffma_step(sums, shared[buffer][0], shared[buffer][1]); });

        // the pipeline's barriers stand between this expert's additions and what was there before
        if (first_output + column >= args.hidden_size) continue;
#pragma unroll
        for (int i = 0; i < C::kRows; ++i) {
          const int token = token_of_row(t / C::kThreadsN * C::kRows + i);
          if (token < 0) continue;
          float4* out = reinterpret_cast<float4*>(y + token * args.hidden_size + column);
          const float4 before = *out;
          *out = float4{before.x + sums[i][0], before.y + sums[i][1], before.z + sums[i][2],
                        before.w + sums[i][3]};
        }
      }
    }
  }
}

}  // namespace dsmoe::cuda

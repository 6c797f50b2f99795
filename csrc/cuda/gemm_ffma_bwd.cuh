// The backward's own GEMMs in exact fp32, on the tile of gemm_ffma.cuh.                   see expert_mlp_bwd.cu
//
//   neurons   g, u and da of 64 pairs x 64 neurons: three sums of 32 registers each, 7 loads from shared
//             memory for 96 multiply-adds; da alone where the forward saved g and u
//   weights   64 neurons x 64 columns of a weight gradient, the sum running over the expert's tokens;
//             both operands have their terms outermost in global memory already
#pragma once

#include "cuda/gemm_ffma.cuh"
#include "cuda/gemm_neurons.cuh"
#include "cuda/gemm_weights.cuh"

namespace dsmoe::cuda {

template <bool kSaved>
__global__ void __launch_bounds__(kThreads)
    neurons_ffma_kernel(const __grid_constant__ NeuronsArgs<float> args) {
  using C = FfmaTile;
  enum { kDy, kDown, kX, kGate, kUp };
  constexpr int kMatrices = kSaved ? 2 : 5;
  __shared__ __align__(16) float shared[2][kMatrices][C::kMatrixFloats];
  const PassArgs<float>& pass = args.pass;
  const int num_steps = static_cast<int>(ceil_div<int64_t>(pass.hidden_size, C::kTerms));
  TileScheduler<C::kTileM, C::kTileN> scheduler(args.listed, pass.expert_offsets, pass.num_experts,
                                                1, INT32_MAX);
  TileScheduler<C::kTileM, C::kTileN>::Tile tile;
  while (scheduler.next(tile)) {
    FfmaRows rows[kMatrices];
#pragma unroll
    for (int i = 0; i < C::kCopies; ++i) {
      const int row = FfmaRows::row(i), pair = tile.pairs.begin + row;
      const bool exists = pair < tile.pairs.end, has_column = row < tile.columns;
      const int64_t token = exists ? args.listed.token_idx[pair] : 0;
      const int64_t weights = (tile.first_row + row) * pass.hidden_size;
      rows[kDy].from[i] = exists ? args.dy + token * args.dy_stride : nullptr;
      rows[kDown].from[i] = has_column ? args.down_proj_t + weights : nullptr;
      if constexpr (!kSaved) {
        rows[kX].from[i] = exists ? pass.x + token * pass.x_stride : nullptr;
        rows[kGate].from[i] = has_column ? pass.gate_proj + weights : nullptr;
        rows[kUp].from[i] = has_column ? pass.up_proj + weights : nullptr;
      }
    }
    FfmaSums gates{}, ups{}, das{};
    ffma_pipeline(
        num_steps,
        [&](int step) {
          const int term = step * C::kTerms;
          const bool valid = term + FfmaRows::group() * 4 < pass.hidden_size;
#pragma unroll
          for (int m = 0; m < kMatrices; ++m) rows[m].fetch(term, valid);
        },
        [&](int buffer) {
#pragma unroll
          for (int m = 0; m < kMatrices; ++m) rows[m].store(shared[buffer][m]);
        },
        [&](int buffer, int term) {
          const auto& matrices = shared[buffer];
          ffma_term(das, matrices[kDy], matrices[kDown], term);
          if constexpr (!kSaved) {
            ffma_term(gates, matrices[kX], matrices[kGate], term);
            ffma_term(ups, matrices[kX], matrices[kUp], term);
          }
        });

    const int64_t tile_column = pass.expert_columns[tile.expert] + tile.column;
    // columns past the end within 4 are zeros, as the rows were
    const bool has_column = C::column() < tile.columns;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
      const int pair = tile.pairs.begin + C::row() + i;
      const bool exists = pair < tile.pairs.end;
      const int64_t token = exists ? args.listed.token_idx[pair] : 0;
      const float weight = exists ? pass.gates[token * pass.num_experts + tile.expert] : 0.f;
      if constexpr (kSaved) {
        const int count = exists ? tile.columns - C::column() : 0;
        const float* saved =
            args.saved + token * 2 * pass.intermediate_size + tile.first_row + C::column();
        load_saved(gates[i], saved, count);
        load_saved(ups[i], saved + pass.intermediate_size, count);
      }
      float gated[C::kColumns], dgate[C::kColumns], dup[C::kColumns], dot = 0.f;
#pragma unroll
      for (int j = 0; j < C::kColumns; ++j) {
        const float s = 1.f / (1.f + expf(-gates[i][j]));
        const Neuron neuron(gates[i][j], ups[i][j], das[i][j], s, weight);
        gated[j] = neuron.gated;
        dgate[j] = neuron.dgate;
        dup[j] = neuron.dup;
        dot += neuron.dot;
      }
#pragma unroll
      for (int step = 1; step < kPartialColumns / C::kColumns; step *= 2) {
        dot += __shfl_xor_sync(kAllLanes, dot, step);
      }
      if (!exists || !has_column) continue;
      const int64_t at = token * pass.width + tile_column + C::column();
      if (C::column() % kPartialColumns == 0) args.partial[at / kColumnAlign] = dot;
      __stcg(reinterpret_cast<float4*>(args.gated + at), as_vector(gated));
      __stcg(reinterpret_cast<float4*>(args.dgate + at), as_vector(dgate));
      __stcg(reinterpret_cast<float4*>(args.dup + at), as_vector(dup));
    }
  }
}

static __global__ void __launch_bounds__(kThreads)
    weights_ffma_kernel(const __grid_constant__ WeightsArgs<float> args) {
  using C = FfmaTile;
  __shared__ __align__(16) float shared[2][2][C::kMatrixFloats];  // neurons; x or dy
  const PassArgs<float>& pass = args.pass;
  NeuronTiles<C::kTileM, C::kTileN> tiles(pass.expert_offsets, pass.num_experts, pass.hidden_size);
  NeuronTiles<C::kTileM, C::kTileN>::Tile tile;
  while (tiles.next(tile)) {
    const PairRange pairs{pass.lists.pair_offsets[tile.expert],
                          pass.lists.pair_offsets[tile.expert + 1]};
    const int64_t neuron = pass.expert_columns[tile.expert] + tile.neuron + FfmaTerms::column();
    const int64_t column = tile.column + FfmaTerms::column();
    const bool has_neuron = FfmaTerms::column() < tile.neurons;
    const bool has_column = column < pass.hidden_size;
    FfmaTerms left, right;
    FfmaSums sums{};
    ffma_pipeline(
        ceil_div(pairs.count(), C::kTerms),
        [&](int step) {
#pragma unroll
          for (int i = 0; i < C::kCopies; ++i) {
            const int pair = pairs.begin + step * C::kTerms + FfmaTerms::term(i);
            const bool exists = pair < pairs.end;
            const int64_t token = exists ? pass.lists.token_idx[pair] : 0;
            left.fetch(i, args.p + token * pass.width + neuron, exists && has_neuron);
            right.fetch(i, args.q + token * args.q_stride + column, exists && has_column);
          }
        },
        [&](int buffer) {
          left.store(shared[buffer][0]);
          right.store(shared[buffer][1]);
        },
        [&](int buffer, int term) { ffma_term(sums, shared[buffer][0], shared[buffer][1], term); });
    if (tile.column + C::column() >= pass.hidden_size) continue;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
      if (C::row() + i >= tile.neurons) continue;
      const int64_t row = tile.first_row + C::row() + i;
      auto* out = reinterpret_cast<float4*>(args.result + row * pass.hidden_size + tile.column +
                                            C::column());
      const float4 before = args.turn.is_first ? float4{} : *out;
      *out = float4{before.x + sums[i][0], before.y + sums[i][1], before.z + sums[i][2],
                    before.w + sums[i][3]};
    }
  }
}

}  // namespace dsmoe::cuda

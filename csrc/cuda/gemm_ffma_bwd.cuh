// The backward's own GEMMs in exact fp32, on the tile of gemm_ffma.cuh.                   see expert_mlp_bwd.cu
//
//   neurons   g, u and da of 64 pairs x 64 neurons: three sums of 32 registers each; da alone where the forward saved g and u
//   weights   64 neurons x 64 columns of a weight gradient, the sum running over the expert's tokens;
//             both operands have their terms outermost in global memory already
#pragma once

#include "cuda/gemm_ffma.cuh"
#include "cuda/gemm_neurons.cuh"
#include "cuda/gemm_weights.cuh"

namespace dsmoe::cuda {

// What the gradients are made of, for row i of a thread's sums.
template <class T, class Tile>
__device__ __forceinline__ void finish_ffma_row(const NeuronsArgs<T>& args, const Tile& tile, int i,
                                                const float (&g)[FfmaTile::kNeighbours],
                                                const float (&u)[FfmaTile::kNeighbours],
                                                const float (&da)[FfmaTile::kNeighbours]) {
  using C = FfmaTile;
  const PassArgs<T>& pass = args.pass;
  const int64_t tile_column = pass.expert_columns[tile.expert] + tile.column;
  const int columns = ceil_div(tile.columns, 4) * 4;  // zeros at the end, even of an infinite gate
  const int column = C::column();
  const int pair = tile.pairs.begin + C::row(i);
  const bool exists = pair < tile.pairs.end;
  const int64_t token = exists ? args.listed.token_idx[pair] : 0;
  const float weight = exists ? pass.gates[token * pass.num_experts + tile.expert] : 0.f;
  const int64_t at = token * pass.width + tile_column + column;
  float gated[C::kNeighbours], dgate[C::kNeighbours], dup[C::kNeighbours], dot = 0.f;
#pragma unroll
  for (int j = 0; j < C::kNeighbours; ++j) {
    const Activated act = pass.exact.both(g[j]);
    const Neuron neuron(act, u[j], da[j], column + j < tile.columns ? weight : 0.f);
    gated[j] = neuron.gated;
    dgate[j] = neuron.dgate;
    dup[j] = neuron.dup;
    dot += neuron.dot;
  }
#pragma unroll
  for (int step = 1; step < kPartialColumns / C::kNeighbours; step *= 2) {
    dot += __shfl_xor_sync(kAllLanes, dot, step);
  }
  if (!exists || column >= columns) return;
  store_quad(args.gated + at, gated);
  store_quad(args.dgate + at, dgate);
  store_quad(args.dup + at, dup);
  if (column % kPartialColumns == 0) args.partial[at / kColumnAlign] = dot;
}

template <class T, bool kSaved>
__global__ void __launch_bounds__(kThreads)
    neurons_ffma_kernel(const __grid_constant__ NeuronsArgs<T> args) {
  using C = FfmaTile;
  enum { kDy, kDown, kX, kGate, kUp };
  constexpr int kMatrices = kSaved ? 2 : 5;
  __shared__ __align__(16) float shared[2][kMatrices][C::kMatrixFloats];
  const PassArgs<T>& pass = args.pass;
  const int num_steps = static_cast<int>(ceil_div<int64_t>(pass.hidden_size, C::kTerms));
  TileScheduler<C::kTileM, C::kTileN> scheduler(args.listed, pass.expert_offsets, pass.num_experts,
                                                pass.group_size, 1, INT32_MAX);
  typename TileScheduler<C::kTileM, C::kTileN>::Tile tile;
  while (scheduler.next(tile)) {
    FfmaRows rows[kMatrices];
#pragma unroll
    for (int i = 0; i < C::kCopies; ++i) {
      const int row = FfmaRows::row(i), pair = tile.pairs.begin + row;
      const bool exists = pair < tile.pairs.end, has_column = row < tile.columns;
      const int64_t token = exists ? args.listed.token_idx[pair] : 0;
      const int64_t neuron = tile.first_row + row;
      rows[kDy].from[i] = exists ? args.dy + token * args.dy_stride : nullptr;
      rows[kDown].from[i] = has_column ? args.down_proj_t.at(tile.expert, neuron) : nullptr;
      if constexpr (!kSaved) {
        rows[kX].from[i] = exists ? pass.x + token * pass.x_stride : nullptr;
        rows[kGate].from[i] = has_column ? pass.gate_proj.at(tile.expert, neuron) : nullptr;
        rows[kUp].from[i] = has_column ? pass.up_proj.at(tile.expert, neuron) : nullptr;
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
          add_term(das, matrices[kDy], matrices[kDown], term);
          if constexpr (!kSaved) {
            add_term(gates, matrices[kX], matrices[kGate], term);
            add_term(ups, matrices[kX], matrices[kUp], term);
          }
        });

    const int column = C::column();
    if constexpr (kSaved) {  // all at once, and first: what is made of them is long
#pragma unroll
      for (int i = 0; i < C::kRows; ++i) {
        const int pair = tile.pairs.begin + C::row(i);
        const bool exists = pair < tile.pairs.end;
        const int64_t token = exists ? args.listed.token_idx[pair] : 0;
        const float* saved =
            args.saved + token * 2 * pass.intermediate_size + tile.first_row + column;
        load_saved(gates[i], saved, exists ? tile.columns - column : 0);
        load_saved(ups[i], saved + pass.intermediate_size, exists ? tile.columns - column : 0);
      }
    }
    // a loop of this length is not unrolled, and sums must stay in registers
    static_assert(C::kRows == 8);
    auto finish = [&](int i) { finish_ffma_row(args, tile, i, gates[i], ups[i], das[i]); };
    finish(0), finish(1), finish(2), finish(3), finish(4), finish(5), finish(6), finish(7);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    weights_ffma_kernel(const __grid_constant__ WeightsArgs<T> args) {
  using C = FfmaTile;
  __shared__ __align__(16) float shared[2][2][C::kMatrixFloats];  // neurons; x or dy
  const PassArgs<T>& pass = args.pass;
  NeuronTiles<C::kTileM, C::kTileN> tiles(pass.expert_offsets, pass.num_experts, pass.group_size,
                                          pass.hidden_size);
  typename NeuronTiles<C::kTileM, C::kTileN>::Tile tile;
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
        [&](int buffer, int term) { add_term(sums, shared[buffer][0], shared[buffer][1], term); });
    const int64_t own = tile.column + C::column();
    if (own >= pass.hidden_size) continue;
#pragma unroll
    for (int i = 0; i < C::kRows; ++i) {
      if (C::row(i) >= tile.neurons) continue;
      float* out = args.result + (tile.first_row + C::row(i)) * pass.hidden_size + own;
      if (args.turn.is_first) {
        store_quad(out, sums[i]);
      } else {
        add_quad(out, sums[i]);
      }
    }
  }
}

}  // namespace dsmoe::cuda

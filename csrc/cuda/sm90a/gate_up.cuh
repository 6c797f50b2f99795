// gate_up on sm_90a: a[t, e's columns] = G[t,e] * act(x_t Wg_e) * (x_t Wu_e)                 see sm90a/forward.cu
//
//   rows     pairs of one expert, x gathered by token_idx      [256, H]
//   columns  neurons of the expert, rows of Wg and of Wu       [96, H] each, one below the other
//   result   activations; g and u too where they are wanted    [256, 96]
//
// Experts of at most 128, 32 and 16 neurons get tiles of 64, 32 and 16 columns; all larger ones 64 where
// g and u are wanted. The width of a tile changes no bit.
// Both products come from one wgmma, so that a thread holds gate and up of the same neurons. Rows of
// weights beyond the expert's end belong to the next expert: what they give is never stored.
#pragma once

#include "cuda/saved_activations.cuh"
#include "cuda/sm90a/gathered.cuh"

namespace dsmoe::cuda::sm90a {

template <class T, int kColumns, int kLive, class Tile>
__device__ __forceinline__ void store_activations(const PassArgs<T>& args, const Tile& tile,
                                                  const float (&sums)[kLive][kColumns]) {
  using N = Neurons<kColumns>;
  using All = Access<4 * N::kTogether>;  // what a lane stores at once
  using Rounded = T[2 * N::kTogether];
  const int lane = threadIdx.x % kWarp;
  const int columns = ceil_div(tile.columns, kChunk) * kChunk;  // the last ones are zeros
  T* first = args.activations + args.expert_columns[tile.expert] + tile.column;
#pragma unroll
  for (int block = 0; block < kLive; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const LanePair pair = pair_of_sums(args.lists, tile, block, half);
      const float weight = gate_of(args, pair, tile.expert);
      T* out = first + pair.token * args.width;
#pragma unroll
      for (int j = 0; j < N::kBlocks; j += N::kTogether) {
        alignas(16) uint32_t packed[N::kTogether];
#pragma unroll
        for (int i = 0; i < N::kTogether; ++i) {
          const float* gate = &sums[block][(j + i) * 4 + half * 2];
          const float* up = &sums[block][(N::kBlocks + j + i) * 4 + half * 2];
          const int column = (j + i) * 8 + lane % 4 * 2;
          packed[i] = pack(
              column < tile.columns ? weight * (args.logistic.value(gate[0]) * up[0]) : 0.f,
              column + 1 < tile.columns ? weight * (args.logistic.value(gate[1]) * up[1]) : 0.f,
              T());
        }
        const int column = j * 8 + make_neighbours(packed);
        if (pair.exists && column < columns) {
          __stcg(reinterpret_cast<All*>(out + column), reinterpret_cast<const All&>(packed));
        }
        if constexpr (N::kMaySave) {
          if (args.saved == nullptr) continue;
#pragma unroll
          for (int matrix = 0; matrix < 2; ++matrix) {
#pragma unroll
            for (int i = 0; i < N::kTogether; ++i) {
              const float* v = &sums[block][(matrix * N::kBlocks + j + i) * 4 + half * 2];
              packed[i] = pack_finite(v[0], v[1], T());
            }
            make_neighbours(packed);
            const int64_t at = (2 * pair.token + matrix) * args.intermediate_size + tile.first_row;
            store_rounded<T>(args.saved + at + column, reinterpret_cast<const Rounded&>(packed),
                             pair.exists ? tile.columns - column : 0);
          }
        }
      }
    }
  }
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    gate_up_kernel(const __grid_constant__ PassArgs<T> args,
                   const __grid_constant__ CUtensorMap gate_proj,
                   const __grid_constant__ CUtensorMap up_proj, int min_size, int max_size) {
  multiply_gathered<T, kColumns, kColumns>(args, args.lists, args.x, args.x_stride, gate_proj,
                                           up_proj, args.gate_proj.gap, min_size, max_size,
                                           [&](const auto& tile, const auto& sums) {
                                             store_activations<T, kColumns>(args, tile, sums);
                                           });
}

}  // namespace dsmoe::cuda::sm90a

// The backward per neuron on sm_90a (gemm_neurons.cuh says what it computes)            see sm90a/backward.cu
//
//   recompute   g = x_t Wg, u = x_t Wu, where the forward did not save them   [256, 96] each
//   neurons     da = dy_t Wd^T, then all that the gradients are made of       [256, 160]
//
// In one kernel three sums of fp32 would leave room for tiles of 128 x 128 only, whose rows and weights
// are more than L2 can bring in time. So g and u wait, rounded as the forward saves them, where their
// own gradients will stand: the thread that reads them there writes those. 192 neurons a tile would be
// for da what 96 are for g and u, but then this end of a tile does not get by on its registers.
#pragma once

#include "cuda/gemm_neurons.cuh"
#include "cuda/sm90a/gathered.cuh"

namespace dsmoe::cuda::sm90a {

template <class T, int kColumns, int kLive, class Tile>
__device__ __forceinline__ void store_gate_up(const NeuronsArgs<T>& args, const Tile& tile,
                                              const float (&sums)[kLive][kColumns]) {
  using N = Neurons<kColumns>;
  using All = Access<4 * N::kTogether>;  // what a lane stores at once
  const PassArgs<T>& pass = args.pass;
  const int64_t first = pass.expert_columns[tile.expert] + tile.column;
#pragma unroll
  for (int block = 0; block < kLive; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const LanePair pair = pair_of_sums(args.listed, tile, block, half);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        T* out = (part == 0 ? args.dgate : args.dup) + pair.token * pass.width + first;
#pragma unroll
        for (int j = 0; j < N::kBlocks; j += N::kTogether) {
          alignas(16) uint32_t packed[N::kTogether];
#pragma unroll
          for (int i = 0; i < N::kTogether; ++i) {
            const float* sum = &sums[block][(part * N::kBlocks + j + i) * 4 + half * 2];
            packed[i] = pack_finite(sum[0], sum[1], T());
          }
          const int column = make_neighbours(packed);
          if (pair.exists && column < tile.columns - j * 8) {
            __stcg(reinterpret_cast<All*>(out + j * 8 + column),
                   reinterpret_cast<const All&>(packed));
          }
        }
      }
    }
  }
}

// Eight numbers, of which `count` exist. In the workspace they lie in one access, and something is behind
// them.
template <bool kSaved, class T>
__device__ __forceinline__ void read_activations(T (&v)[kChunk], const T* from, int count) {
  if constexpr (kSaved) {
    read_rounded(v, from, count);
  } else {
    const uint4 all = count > 0 ? *reinterpret_cast<const uint4*>(from) : uint4{};
    reinterpret_cast<uint4&>(v) = all;
  }
}

// A lane gets eight neighbouring neurons of a row, four lanes the 32 of a part of dgates.
template <class T, int kColumns, bool kSaved, int kLive, class Tile>
__device__ __forceinline__ void finish_neurons(const NeuronsArgs<T>& args, const Tile& tile,
                                               const float (&sums)[kLive][kColumns]) {
  const PassArgs<T>& pass = args.pass;
  const int first = threadIdx.x % 4 * kChunk;
  const int64_t tile_column = pass.expert_columns[tile.expert] + tile.column + first;
#pragma unroll
  for (int block = 0; block < kLive; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const LanePair pair = pair_of_sums(args.listed, tile, block, half);
      const float weight = gate_of(pass, pair, tile.expert);
      const int columns = pair.exists ? tile.columns - first : 0;
      const int64_t at = pair.token * pass.width + tile_column;
      const T *g = args.dgate + at, *u = args.dup + at;
      if (kSaved) {
        g = args.saved + pair.token * 2 * pass.intermediate_size + tile.first_row + first;
        u = g + pass.intermediate_size;
      }
      alignas(16) T g_ahead[kChunk], u_ahead[kChunk];
      auto look_ahead = [&](int j) {
        read_activations<kSaved>(g_ahead, g + j * 8, columns - j * 8);
        read_activations<kSaved>(u_ahead, u + j * 8, columns - j * 8);
      };
      look_ahead(0);
#pragma unroll
      for (int j = 0; j < kColumns / 4; j += 4) {
        if (j * 8 >= tile.columns) break;
        T gates[kChunk], ups[kChunk];  // as they are kept: half as many registers
        float das[kChunk], parts[2][4];
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          gates[i] = g_ahead[i];
          ups[i] = u_ahead[i];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int b = 0; b < 4; ++b) parts[i][b] = sums[block][(j + b) * 4 + half * 2 + i];
          make_neighbours(parts[i]);
        }
#pragma unroll
        for (int i = 0; i < kChunk; ++i) das[i] = parts[i % 2][i / 2];
        if (j + 4 < kColumns / 4) look_ahead(j + 4);
        store_neurons(args, at + j * 8, columns - j * 8, weight, gates, ups, das);
      }
    }
  }
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    recompute_kernel(const __grid_constant__ NeuronsArgs<T> args,
                     const __grid_constant__ CUtensorMap gate_proj,
                     const __grid_constant__ CUtensorMap up_proj, int min_size, int max_size) {
  const PassArgs<T>& pass = args.pass;
  multiply_gathered<T, kColumns, kColumns>(
      pass, args.listed, pass.x, pass.x_stride, gate_proj, up_proj, pass.gate_proj.gap, min_size,
      max_size,
      [&](const auto& tile, const auto& sums) { store_gate_up<T, kColumns>(args, tile, sums); });
}

template <class T, int kColumns, bool kSaved>
__global__ void __launch_bounds__(kThreads, 1)
    neurons_kernel(const __grid_constant__ NeuronsArgs<T> args,
                   const __grid_constant__ CUtensorMap down_proj_t, int min_size, int max_size) {
  multiply_gathered<T, kColumns, 2 * kColumns>(
      args.pass, args.listed, args.dy, args.dy_stride, down_proj_t, down_proj_t,
      args.down_proj_t.gap, min_size, max_size, [&](const auto& tile, const auto& sums) {
        finish_neurons<T, kColumns, kSaved>(args, tile, sums);
      });
}

}  // namespace dsmoe::cuda::sm90a

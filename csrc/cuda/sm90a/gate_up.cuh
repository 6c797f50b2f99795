// gate_up on sm_90a: a[t, e's columns] = G[t,e] * silu(x_t Wg_e) * (x_t Wu_e)                see sm90a/forward.cu
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

#include "cuda/gemm_gate_up.cuh"  // swiglu
#include "cuda/sm90a/pipeline.cuh"

namespace dsmoe::cuda::sm90a {

// The lane keeps one of two registers, and gets the same one of its neighbour's: two blocks' columns
// become neighbours.
__device__ __forceinline__ void exchange(uint32_t& low, uint32_t& high, int step) {
  const bool keeps_high = threadIdx.x & step;
  const uint32_t got = __shfl_xor_sync(kAllLanes, keeps_high ? low : high, step);
  (keeps_high ? low : high) = got;
}

// Of pairs of columns of so many blocks, the same in each: neighbours. Returns the first one's column.
__device__ __forceinline__ int make_neighbours(uint32_t (&pairs)[2]) {
  exchange(pairs[0], pairs[1], 1);
  return threadIdx.x % 2 * 8 + threadIdx.x / 2 % 2 * 4;
}
__device__ __forceinline__ int make_neighbours(uint32_t (&pairs)[4]) {
  exchange(pairs[0], pairs[1], 1);
  exchange(pairs[2], pairs[3], 1);
  exchange(pairs[0], pairs[2], 2);
  exchange(pairs[1], pairs[3], 2);
  return threadIdx.x % 4 * 8;
}

template <int kColumns>
struct Neurons {
  static constexpr int kBlocks = kColumns / 8;                 // of 8 columns, of each matrix
  static constexpr int kTogether = kBlocks < 4 ? kBlocks : 4;  // blocks that lanes exchange
  static constexpr int kBytes = 2 * kColumns * kLine;          // weights of a step
  // 96 columns leave no registers for where g and u go
  static constexpr bool kMaySave = kColumns <= 64;
};

template <class T, int kColumns, int kLive, class Tile>
__device__ __forceinline__ void store_activations(const PassArgs<T>& args, const Tile& tile,
                                                  const float (&sums)[kLive][kColumns]) {
  using N = Neurons<kColumns>;
  using All = Access<4 * N::kTogether>;  // what a lane stores at once
  using Rounded = T[2 * N::kTogether];
  const int group = threadIdx.x / kGroup, warp = threadIdx.x % kGroup / kWarp;
  const int lane = threadIdx.x % kWarp, rows = tile.pairs.count();
  const int columns = ceil_div(tile.columns, kChunk) * kChunk;  // the last ones are zeros
  T* first = args.activations + args.expert_columns[tile.expert] + tile.column;
#pragma unroll
  for (int block = 0; block < kLive; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (2 * block + group) * kBlockRows + warp * 16 + half * 8 + lane / 4;
      const bool exists = row < rows;
      const int64_t token = exists ? args.lists.token_idx[tile.pairs.begin + row] : 0;
      const float weight = exists ? args.gates[token * args.num_experts + tile.expert] : 0.f;
      T* out = first + token * args.width;
#pragma unroll
      for (int j = 0; j < N::kBlocks; j += N::kTogether) {
        alignas(16) uint32_t packed[N::kTogether];
#pragma unroll
        for (int i = 0; i < N::kTogether; ++i) {
          const float* gate = &sums[block][(j + i) * 4 + half * 2];
          const float* up = &sums[block][(N::kBlocks + j + i) * 4 + half * 2];
          const int column = (j + i) * 8 + lane % 4 * 2;
          packed[i] = pack(column < tile.columns ? weight * swiglu(gate[0], up[0]) : 0.f,
                           column + 1 < tile.columns ? weight * swiglu(gate[1], up[1]) : 0.f, T());
        }
        const int column = j * 8 + make_neighbours(packed);
        if (exists && column < columns) {
          __stcg(reinterpret_cast<All*>(out + column), reinterpret_cast<const All&>(packed));
        }
        if (!N::kMaySave || args.saved == nullptr) continue;
#pragma unroll
        for (int matrix = 0; matrix < 2; ++matrix) {
#pragma unroll
          for (int i = 0; i < N::kTogether; ++i) {
            const float* v = &sums[block][(matrix * N::kBlocks + j + i) * 4 + half * 2];
            packed[i] = pack(v[0], v[1], T());
          }
          make_neighbours(packed);
          const int64_t at = (2 * token + matrix) * args.intermediate_size + tile.first_row;
          store_rounded<T>(args.saved + at + column, reinterpret_cast<const Rounded&>(packed),
                           exists ? tile.columns - column : 0);
        }
      }
    }
  }
}

template <class T, int kColumns, int kLive, class Tile>
__device__ __forceinline__ void gate_up_tile(const PassArgs<T>& args, const Tile& tile, Ring& ring,
                                             int num_steps) {
  float sums[kLive][kColumns]{};
  multiply<T, 0>(ring, num_steps, sums);
  store_activations<T, kColumns>(args, tile, sums);
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    gate_up_kernel(const __grid_constant__ PassArgs<T> args,
                   const __grid_constant__ CUtensorMap gate_proj,
                   const __grid_constant__ CUtensorMap up_proj, int min_size, int max_size) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  make_mbarriers(base);
  const int num_steps = static_cast<int>(ceil_div<int64_t>(args.hidden_size, kTerms));
  using Scheduler = TileScheduler<kMaxRows, kColumns>;
  Scheduler scheduler(args.lists, args.expert_offsets, args.num_experts, min_size, max_size);
  typename Scheduler::Tile tile;

  if (threadIdx.x >= kConsumers) {
    Registers<56, 224>::fetch();
    Producer producer(base);
    const int first = threadIdx.x % kGroup / kChunks, chunk = threadIdx.x % kChunks;
    while (scheduler.next(tile)) {
      const int rows = blocks_of(tile.pairs.count()) * kBlockRows;
      const T* from[kRowCopies];
#pragma unroll
      for (int i = 0; i < kRowCopies; ++i) {
        const int pair = tile.pairs.begin + first + i * kRowsAtOnce;
        from[i] =
            pair < tile.pairs.end ? args.x + args.lists.token_idx[pair] * args.x_stride : nullptr;
      }
      for (int step = 0; step < num_steps; ++step) {
        const int k = step * kTerms;
        if (producer.begin(Neurons<kColumns>::kBytes)) {
          const uint32_t to = producer.stage() + kRowsBytes;
          copy_box(to, gate_proj, tile.first_row, k, producer.full());
          copy_box(to + kColumns * kLine, up_proj, tile.first_row, k, producer.full());
        }
        copy_rows(producer.stage(), rows, k + chunk * kChunk < args.hidden_size, args.x,
                  [&](int i) { return from[i] == nullptr ? nullptr : from[i] + k; });
        producer.end();
      }
    }
    producer.finish();
  } else {
    Registers<56, 224>::multiply();
    Ring ring(base);
    while (scheduler.next(tile)) {
      const int live = live_blocks(tile.pairs.count(), threadIdx.x / kGroup);
      if (live == 2) {
        gate_up_tile<T, kColumns, 2>(args, tile, ring, num_steps);
      } else if (live == 1) {
        gate_up_tile<T, kColumns, 1>(args, tile, ring, num_steps);
      } else {
        pass_by(ring, num_steps);
      }
    }
  }
}

}  // namespace dsmoe::cuda::sm90a

// A weight gradient: dW[i, :] = sum over the active tokens t of e of p[t,i] q_t       see expert_mlp_bwd.cu
//
//   left     neurons of one expert, columns of p               [128, tokens]
//   right    q = x or dy, rows gathered                        [tokens, 128]
//   result   rows of dW                                        [128, 128]
//
// The sum runs down the rows of both operands, so both are read transposed from shared memory. Tiles of at
// most 32 and of at most 64 neurons have loops of their own, which neither copy nor multiply what is not
// there; blocks of 16 neurons are dealt to the warps in turn. An expert without tokens gets zeros by the
// same loop, run no times. Where tokens come in several passes, fp32 sums wait in the workspace until the
// last one, and only then become dW; fp32 itself waits in dW. A later pass starts from them: a thread reads
// all of its sums at once, before the main loop, which waits for memory at that time anyway.
#pragma once

#include "cuda/gemm_gate_up.cuh"

namespace dsmoe::cuda {

template <class T>
struct WeightsArgs {
  PassArgs<T> pass;
  const T* p;  // [Tp,width]
  int64_t q_stride;
  const T* q;   // [Tp,H]
  T* result;    // [I,H]
  float* sums;  // [rows of the pass, H]   not used by fp32, nor if one launch makes the whole sum
  Turn turn;    // among the passes over tokens
};

// Those that are wanted.
template <class T>
struct AllWeights {
  WeightsArgs<T> of[3];
  int count = 0;
};

template <class T>
struct WeightsTile {
  static constexpr int kTileM = 128, kTileN = 128;
  static constexpr int kWarpsM = 2, kWarpsN = 2;
  static constexpr int kRowBlocks = kTileM / 16 / kWarpsM;  // 4
  static constexpr int kBlocks = kTileN / 8 / kWarpsN;      // 8
  using Left = DepthTile<T, kTileM>;
  using Right = DepthTile<T, kTileN>;
  static constexpr int kStageBytes = Left::kBytes + Right::kBytes;  // 16 KiB
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kSharedBytes <= 48 << 10, "two CTAs per SM, and no opt-in needed");
  static_assert(kTileK<T> <= kWarp, "a lane per term of the sum");
};

template <class T>
using WeightsSums = float[WeightsTile<T>::kRowBlocks][WeightsTile<T>::kBlocks][4];

// With the first kLive of the warp's row blocks.
template <int kLive, class T>
__device__ __forceinline__ void weights_step(WeightsSums<T>& sums, uint32_t stage, int warp_m,
                                             int warp_n) {
  using C = WeightsTile<T>;
  const uint32_t right = stage + C::Left::kBytes;
#pragma unroll
  for (int k = 0; k < kTileK<T>; k += kMmaTerms<T>) {
    uint32_t a[kLive][4];
#pragma unroll
    for (int i = 0; i < kLive; ++i) {
      C::Left::load_left(a[i], stage, k, i * C::kWarpsM + warp_m);
    }
#pragma unroll
    for (int j = 0; j < C::kBlocks; j += 2) {
      uint32_t b[4];
      C::Right::load_right(b, right, k, warp_n * C::kBlocks + j);
      round_operands(b, T());
#pragma unroll
      for (int i = 0; i < kLive; ++i) {
        mma(sums[i][j], a[i], b[0], b[1], T());
        mma(sums[i][j + 1], a[i], b[2], b[3], T());
      }
    }
  }
}

// Four neighbouring lanes exchange words: word j of lane q becomes word q of lane j.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool is_high = threadIdx.x & bit;
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & bit) continue;
      const int high = low | bit;
      const uint32_t got = __shfl_xor_sync(kAllLanes, is_high ? words[low] : words[high], bit);
      words[low] = is_high ? got : words[low];
      words[high] = is_high ? words[high] : got;
    }
  }
}

// Where a row of a tile goes: its sums wait there until the last pass, and become dW here. H is a
// multiple of 8: of a block of 8 columns all exist or none.
template <class T>
struct GradientRow {
  Turn turn;
  float* waiting;  // of the lane's two columns in the first block
  T* result;       // of the lane's block among the first four
  int columns;     // that exist

  __device__ GradientRow(const WeightsArgs<T>& args, int64_t row, int64_t column, bool exists)
      : turn(args.turn),
        waiting(sums_of(args, row) + column + threadIdx.x % 4 * 2),
        result(args.result + row * args.pass.hidden_size + column + threadIdx.x % 4 * 8),
        columns(exists ? static_cast<int>(args.pass.hidden_size - column) : 0) {}

  // What the passes before made of the lane's two columns.
  __device__ __forceinline__ float2 load(int block) const {
    return block * 8 < columns ? __ldcg(reinterpret_cast<const float2*>(waiting + block * 8))
                               : float2{};
  }
  // Four neighbouring blocks, the first of which is `block`.
  __device__ __forceinline__ void store(int block, const float (&sums)[4][2]) const {
    [[maybe_unused]] uint32_t words[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const bool exists = (block + b) * 8 < columns;
      float2* at = reinterpret_cast<float2*>(waiting + (block + b) * 8);
      if (exists && (kIsFloat<T> || !turn.is_last)) __stcg(at, {sums[b][0], sums[b][1]});
      if constexpr (!kIsFloat<T>) words[b] = pack(sums[b][0], sums[b][1], T());
    }
    if constexpr (!kIsFloat<T>) {
      if (!turn.is_last) return;
      transpose_quad(words);  // whole sectors: a lane stores a block
      if (static_cast<int>(block + threadIdx.x % 4) * 8 >= columns) return;
      __stcg(reinterpret_cast<uint4*>(result + block * 8),
             uint4{words[0], words[1], words[2], words[3]});
    }
  }

 private:
  static __device__ __forceinline__ float* sums_of(const WeightsArgs<T>& args, int64_t row) {
    if constexpr (kIsFloat<T>) {
      return args.result + row * args.pass.hidden_size;
    } else {
      return args.sums + (row - args.pass.expert_offsets[0]) * args.pass.hidden_size;
    }
  }
};

// act(row, block of rows, half of it) for every row that the lane has sums of.
template <class T, class Tile, class Act>
__device__ __forceinline__ void for_each_row(const WeightsArgs<T>& args, const Tile& tile,
                                             int warp_m, int warp_n, Act act) {
  using C = WeightsTile<T>;
  const int64_t column = tile.column + warp_n * C::kBlocks * 8;
#pragma unroll
  for (int i = 0; i < C::kRowBlocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int neuron = (i * C::kWarpsM + warp_m) * 16 + half * 8 + threadIdx.x % kWarp / 4;
      act(GradientRow<T>(args, tile.first_row + neuron, column, neuron < tile.neurons), i, half);
    }
  }
}

template <class T, class Tile>
__device__ __forceinline__ void weights_prologue(const WeightsArgs<T>& args, const Tile& tile,
                                                 WeightsSums<T>& sums, int warp_m, int warp_n) {
  for_each_row(args, tile, warp_m, warp_n, [&](const GradientRow<T>& row, int i, int half) {
#pragma unroll
    for (int j = 0; j < WeightsTile<T>::kBlocks; ++j) {
      const float2 before = row.load(j);
      sums[i][j][half * 2] = before.x;
      sums[i][j][half * 2 + 1] = before.y;
    }
  });
}

template <class T, class Tile>
__device__ __forceinline__ void weights_epilogue(const WeightsArgs<T>& args, const Tile& tile,
                                                 const WeightsSums<T>& sums, int warp_m,
                                                 int warp_n) {
  for_each_row(args, tile, warp_m, warp_n, [&](const GradientRow<T>& row, int i, int half) {
#pragma unroll
    for (int j = 0; j < WeightsTile<T>::kBlocks; j += 4) {
      float quad[4][2];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        quad[b][0] = sums[i][j + b][half * 2];
        quad[b][1] = sums[i][j + b][half * 2 + 1];
      }
      row.store(j, quad);
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    weights_kernel(const __grid_constant__ WeightsArgs<T> args) {
  using C = WeightsTile<T>;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const PassArgs<T>& pass = args.pass;
  const int t = threadIdx.x, lane = t % kWarp;
  const int warp_m = t / kWarp / C::kWarpsN, warp_n = t / kWarp % C::kWarpsN;
  NeuronTiles<C::kTileM, C::kTileN> tiles(pass.expert_offsets, pass.num_experts, pass.group_size,
                                          pass.hidden_size);
  typename NeuronTiles<C::kTileM, C::kTileN>::Tile tile;
  while (tiles.next(tile)) {
    const PairRange pairs{pass.lists.pair_offsets[tile.expert],
                          pass.lists.pair_offsets[tile.expert + 1]};
    const int first_column = pass.expert_columns[tile.expert] + tile.neuron;
    const int left_end = ceil_div(tile.neurons, kNumbers<T>) * kNumbers<T>;

    // Lane l holds the token of term l, one step ahead of the copies that need it.
    auto token_of_term = [&](int term) {
      return pairs.begin + term < pairs.end ? pass.lists.token_idx[pairs.begin + term] : -1;
    };
    int token_ahead = token_of_term(lane);
    // live: of a warp's row blocks, those that exist
    auto load = [&](auto live, int stage, int step) {
      const uint32_t to = base + stage * C::kStageBytes;
      const int token = token_ahead;
      token_ahead = token_of_term((step + 1) * kTileK<T> + lane);
      // the first so many chunks of every row
      auto copy = [&](auto layout, auto chunks, uint32_t at, const T* matrix, int64_t stride,
                      int first, int64_t end) {
        constexpr int kChunks = decltype(chunks)::value;
        static_assert(kTileK<T> * kChunks % kThreads == 0, "shuffles want all lanes");
#pragma unroll
        for (int i = 0; i < kTileK<T> * kChunks; i += kThreads) {
          const int chunk = (i + t) % kChunks, n = (i + t) / kChunks;
          // eight lanes write at once: of two rows, those that exchange other chunks
          const int term = kChunks < 8 ? n / 8 * 8 + n % 2 * 4 + n / 2 % 4 : n;
          const int64_t row = __shfl_sync(kAllLanes, token, term);
          const int column = first + chunk * kNumbers<T>;
          cp_async_16(at + decltype(layout)::offset(term, chunk), matrix + row * stride + column,
                      row >= 0 && column < end);
        }
      };
      using Left = typename C::Left;
      using Right = typename C::Right;
      copy(Left(),
           std::integral_constant<int, Left::kChunks / C::kRowBlocks* decltype(live)::value>(), to,
           args.p, pass.width, first_column, first_column + left_end);
      copy(Right(), std::integral_constant<int, Right::kChunks>(), to + Left::kBytes, args.q,
           args.q_stride, tile.column, pass.hidden_size);
    };
    WeightsSums<T> sums{};
    if (!args.turn.is_first) weights_prologue(args, tile, sums, warp_m, warp_n);
    auto sum_up = [&](auto live) {
      pipeline(
          ceil_div(pairs.count(), kTileK<T>), [&](int stage, int step) { load(live, stage, step); },
          [&](int stage) {
            weights_step<decltype(live)::value, T>(sums, base + stage * C::kStageBytes, warp_m,
                                                   warp_n);
          });
    };
    if (tile.neurons <= 32) {
      sum_up(std::integral_constant<int, 1>());
    } else if (tile.neurons <= 64) {
      sum_up(std::integral_constant<int, 2>());
    } else {
      sum_up(std::integral_constant<int, C::kRowBlocks>());
    }
    weights_epilogue(args, tile, sums, warp_m, warp_n);
  }
}

}  // namespace dsmoe::cuda

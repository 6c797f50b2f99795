// A weight gradient: dW[i, :] = sum over the active tokens t of e of p[t,i] q_t       see expert_mlp_bwd.cu
//
//   left     neurons of one expert, columns of p               [64, tokens]
//   right    q = x or dy, rows gathered                        [tokens, 128]
//   result   rows of dW                                        [64, 128]
//
// The sum runs down the rows of both operands, so both are read transposed from shared memory. An
// expert without tokens gets zeros by the same loop, run no times. Where tokens come in several passes,
// fp32 sums wait in the workspace until the last one, and only then become dW.
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
  float* sums;  // [rows of the pass, H]   not used if one launch makes the whole sum
  Turn turn;    // among the passes over tokens
};

// Those that are wanted.
template <class T>
struct AllWeights {
  WeightsArgs<T> of[3];
  int count = 0;
};

struct WeightsTile {
  static constexpr int kTileM = 64, kTileN = 128;
  static constexpr int kWarpsM = 2, kWarpsN = 2;
  static constexpr int kRowBlocks = kTileM / 16 / kWarpsM;  // 2
  static constexpr int kBlocks = kTileN / 8 / kWarpsN;      // 8
  using Left = DepthTile<kTileM>;
  using Right = DepthTile<kTileN>;
  static constexpr int kStageBytes = Left::kBytes + Right::kBytes;  // 12 KiB
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kCopiesLeft = Left::kBytes / 16 / kThreads;    // 2
  static constexpr int kCopiesRight = Right::kBytes / 16 / kThreads;  // 4
  static_assert(kTileK == kWarp, "a lane per term of the sum");
};

using WeightsSums = float[WeightsTile::kRowBlocks][WeightsTile::kBlocks][4];

template <class T>
__device__ __forceinline__ void weights_step(WeightsSums& sums, uint32_t stage, int warp_m,
                                             int warp_n) {
  using C = WeightsTile;
  const int lane = threadIdx.x % kWarp;
  const uint32_t right = stage + C::Left::kBytes;
#pragma unroll
  for (int k = 0; k < kTileK; k += 16) {
    uint32_t a[C::kRowBlocks][4];
#pragma unroll
    for (int i = 0; i < C::kRowBlocks; ++i) {
      // matrices: low and high neurons of the low terms, then of the high terms
      const int chunk = (warp_m * C::kRowBlocks + i) * 2 + lane / 8 % 2;
      ldmatrix_x4_trans(a[i], stage + C::Left::offset(k + lane / 16 * 8 + lane % 8, chunk));
    }
#pragma unroll
    for (int j = 0; j < C::kBlocks; j += 2) {
      uint32_t b[4];
      const int chunk = warp_n * C::kBlocks + j + lane / 16;
      ldmatrix_x4_trans(b, right + C::Right::offset(k + lane % 16, chunk));
#pragma unroll
      for (int i = 0; i < C::kRowBlocks; ++i) {
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
        waiting(args.sums + (row - args.pass.expert_offsets[0]) * args.pass.hidden_size + column +
                threadIdx.x % 4 * 2),
        result(args.result + row * args.pass.hidden_size + column + threadIdx.x % 4 * 8),
        columns(exists ? static_cast<int>(args.pass.hidden_size - column) : 0) {}

  // Four neighbouring blocks, the first of which is `block`.
  __device__ __forceinline__ void store(int block, float (&sums)[4][2]) const {
    uint32_t words[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const bool exists = (block + b) * 8 < columns;
      float2* at = reinterpret_cast<float2*>(waiting + (block + b) * 8);
      if (exists && !turn.is_first) {
        const float2 before = *at;
        sums[b][0] += before.x;
        sums[b][1] += before.y;
      }
      if (exists && !turn.is_last) *at = float2{sums[b][0], sums[b][1]};
      words[b] = pack(sums[b][0], sums[b][1], T());
    }
    if (!turn.is_last) return;
    transpose_quad(words);  // whole sectors: a lane stores a block
    if (static_cast<int>(block + threadIdx.x % 4) * 8 >= columns) return;
    __stcg(reinterpret_cast<uint4*>(result + block * 8),
           uint4{words[0], words[1], words[2], words[3]});
  }
};

template <class T, class Tile>
__device__ __forceinline__ void weights_epilogue(const WeightsArgs<T>& args, const Tile& tile,
                                                 const WeightsSums& sums, int warp_m, int warp_n) {
  using C = WeightsTile;
  const int64_t column = tile.column + warp_n * C::kBlocks * 8;
#pragma unroll
  for (int i = 0; i < C::kRowBlocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int neuron = (warp_m * C::kRowBlocks + i) * 16 + half * 8 + threadIdx.x % kWarp / 4;
      const GradientRow<T> row(args, tile.first_row + neuron, column, neuron < tile.neurons);
#pragma unroll
      for (int j = 0; j < C::kBlocks; j += 4) {
        float quad[4][2];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          quad[b][0] = sums[i][j + b][half * 2];
          quad[b][1] = sums[i][j + b][half * 2 + 1];
        }
        row.store(j, quad);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    weights_kernel(const __grid_constant__ WeightsArgs<T> args) {
  using C = WeightsTile;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const PassArgs<T>& pass = args.pass;
  const int t = threadIdx.x, lane = t % kWarp;
  const int warp_m = t / kWarp / C::kWarpsN, warp_n = t / kWarp % C::kWarpsN;
  NeuronTiles<C::kTileM, C::kTileN> tiles(pass.expert_offsets, pass.num_experts, pass.hidden_size);
  typename NeuronTiles<C::kTileM, C::kTileN>::Tile tile;
  while (tiles.next(tile)) {
    const PairRange pairs{pass.lists.pair_offsets[tile.expert],
                          pass.lists.pair_offsets[tile.expert + 1]};
    const int first_column = pass.expert_columns[tile.expert] + tile.neuron;
    const int left_end = ceil_div(tile.neurons, kChunk) * kChunk;

    // Lane l holds the token of term l, one step ahead of the copies that need it.
    auto token_of_term = [&](int term) {
      return pairs.begin + term < pairs.end ? pass.lists.token_idx[pairs.begin + term] : -1;
    };
    int token_ahead = token_of_term(lane);
    auto load = [&](int stage, int step) {
      const uint32_t to = base + stage * C::kStageBytes;
      const int token = token_ahead;
      token_ahead = token_of_term((step + 1) * kTileK + lane);
      auto copy = [&](auto layout, int i, uint32_t at, const T* matrix, int64_t stride, int first,
                      int64_t end) {
        using Layout = decltype(layout);
        const int term = (t + i * kThreads) / Layout::kChunks;
        const int chunk = (t + i * kThreads) % Layout::kChunks;
        const int64_t row = __shfl_sync(kAllLanes, token, term);
        const bool valid = row >= 0 && first + chunk * kChunk < end;
        cp_async_16(at + Layout::offset(term, chunk),
                    matrix + (valid ? row * stride + first + chunk * kChunk : 0), valid);
      };
#pragma unroll
      for (int i = 0; i < C::kCopiesLeft; ++i) {
        copy(typename C::Left(), i, to, args.p, pass.width, first_column, first_column + left_end);
      }
#pragma unroll
      for (int i = 0; i < C::kCopiesRight; ++i) {
        copy(typename C::Right(), i, to + C::Left::kBytes, args.q, args.q_stride, tile.column,
             pass.hidden_size);
      }
    };
    WeightsSums sums{};
    pipeline(ceil_div(pairs.count(), kTileK), load, [&](int stage) {
      weights_step<T>(sums, base + stage * C::kStageBytes, warp_m, warp_n);
    });
    weights_epilogue(args, tile, sums, warp_m, warp_n);
  }
}

}  // namespace dsmoe::cuda

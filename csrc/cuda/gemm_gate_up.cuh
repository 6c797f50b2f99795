// gate_up: a[t, e's columns] = G[t,e] * act(x_t Wg_e) * (x_t Wu_e) for the active pairs        see expert_mlp_fwd.cu
//
//   rows     pairs of one expert, x gathered by token_idx      [128, H]
//   columns  neurons of the expert, rows of Wg and of Wu       [64, H] each
//   result   activations                                       [128, 64]
#pragma once

#include "cuda/saved_activations.cuh"
#include "cuda/token_pass.cuh"

namespace dsmoe::cuda {

// How many of this warp's 16-row blocks hold rows; block i of a warp is block i * kWarpsM + warp_m.
template <int kWarpsM>
__device__ __forceinline__ int live_blocks(int rows, int warp_m) {
  return (ceil_div(rows, 16) - warp_m + kWarpsM - 1) / kWarpsM;
}

template <class T, int kColumns, int kWarpsAlongM>
struct GateUpTile {
  static constexpr int kTileN = kColumns;
  static constexpr int kWarpsM = kWarpsAlongM, kWarpsN = kThreads / kWarp / kWarpsM;
  static constexpr int kRowBlocks = kTileM / 16 / kWarpsM;  // 16-row blocks per warp
  static constexpr int kBlocks = kTileN / 8 / kWarpsN;      // 8-column blocks per warp and matrix
  static constexpr int kGroup = kTogether<T, kBlocks>;      // of them
  using Columns = ColumnTile<kGroup>;
  static constexpr int kRowsBytes = kTileM * kRowBytes, kColumnsBytes = kTileN * kRowBytes;
  static constexpr int kStageBytes = kRowsBytes + 2 * kColumnsBytes;  // rows of x, of Wg, of Wu
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static constexpr int kCopiesA = kTileM / kCopyRows, kCopiesB = 2 * kTileN / kCopyRows;
  static_assert(kSharedBytes <= 48 << 10, "two CTAs per SM, and no opt-in needed");
  static_assert(2 * kTileN % kCopyRows == 0);
};

template <class T, class C>
struct GateUpSums {
  float gate[C::kRowBlocks][C::kBlocks][4], up[C::kRowBlocks][C::kBlocks][4];
};

// Adds one stage's products to the sums.
template <class T, class C>
__device__ __forceinline__ void gate_up_step(GateUpSums<T, C>& sums, uint32_t stage, int warp_m,
                                             int warp_n, int live) {
  const uint32_t gate_tile = stage + C::kRowsBytes, up_tile = gate_tile + C::kColumnsBytes;
#pragma unroll
  for (int k_chunk = 0; k_chunk < kChunksPerRow; k_chunk += 2) {
    uint32_t a[C::kRowBlocks][4];
#pragma unroll
    for (int i = 0; i < C::kRowBlocks; ++i) {
      if (i >= live) continue;
      load_rows(a[i], stage, (i * C::kWarpsM + warp_m) * 16, k_chunk);
      round_operands(a[i], T());
    }
#pragma unroll
    for (int j = 0; j < C::kBlocks; j += 2) {
      const uint32_t at = C::Columns::lane_offset(warp_n * C::kBlocks * 8, j, k_chunk);
      uint32_t gate[4], up[4];
      ldmatrix_x4(gate, gate_tile + at);
      ldmatrix_x4(up, up_tile + at);
      round_operands(gate, T());
      round_operands(up, T());
#pragma unroll
      for (int i = 0; i < C::kRowBlocks; ++i) {
        if (i >= live) continue;
        mma(sums.gate[i][j], a[i], gate[0], gate[1], T());
        mma(sums.gate[i][j + 1], a[i], gate[2], gate[3], T());
        mma(sums.up[i][j], a[i], up[0], up[1], T());
        mma(sums.up[i][j + 1], a[i], up[2], up[3], T());
      }
    }
  }
}

template <class T, class C, class Tile>
__device__ __forceinline__ void gate_up_epilogue(const PassArgs<T>& args, const Tile& tile,
                                                 const GateUpSums<T, C>& sums, int warp_m,
                                                 int warp_n) {
  constexpr int kMine = 2 * C::kGroup;  // neighbouring columns of this lane
  const int lane = threadIdx.x % kWarp, rows = tile.pairs.count();
  const int columns = ceil_div(tile.columns, kNumbers<T>) * kNumbers<T>;
  T* first = args.activations + args.expert_columns[tile.expert] + tile.column;
#pragma unroll
  for (int i = 0; i < C::kRowBlocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (i * C::kWarpsM + warp_m) * 16 + half * 8 + lane / 4;
      if (row >= rows) continue;
      const int64_t token = args.lists.token_idx[tile.pairs.begin + row];
      const float weight = args.gates[token * args.num_experts + tile.expert];
#pragma unroll
      for (int block = 0; block < C::kBlocks; block += C::kGroup) {
        const int column = (warp_n * C::kBlocks + block) * 8 + lane % 4 * kMine;
        // the columns up to the next 16 bytes belong to the expert too, and are zeros, even of an
        // infinite gate
        if (column >= columns) continue;
        float gates[kMine], ups[kMine];
#pragma unroll
        for (int c = 0; c < kMine; ++c) {
          gates[c] = sums.gate[i][block + c / 2][half * 2 + c % 2];
          ups[c] = sums.up[i][block + c / 2][half * 2 + c % 2];
        }
        Neighbours<T, kMine> out;
#pragma unroll
        for (int c = 0; c < kMine; c += 2) {
          const int left = tile.columns - column - c;  // neurons from here on
          out.set(c / 2, left > 0 ? weight * (args.logistic.value(gates[c]) * ups[c]) : 0.f,
                  left > 1 ? weight * (args.logistic.value(gates[c + 1]) * ups[c + 1]) : 0.f);
        }
        if (args.saved != nullptr) {
          T* saved = args.saved + token * 2 * args.intermediate_size + tile.first_row + column;
          store_saved(saved, gates, tile.columns - column);
          store_saved(saved + args.intermediate_size, ups, tile.columns - column);
        }
        out.store(first + token * args.width + column);
      }
    }
  }
}

template <class T, class C>
__global__ void __launch_bounds__(kThreads, 2)
    gate_up_kernel(const __grid_constant__ PassArgs<T> args, int min_size, int max_size) {
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const int t = threadIdx.x, warp_m = t / kWarp / C::kWarpsN, warp_n = t / kWarp % C::kWarpsN;
  const int chunk = t % kChunksPerRow, copy_row = t / kChunksPerRow;
  const int num_steps = static_cast<int>(ceil_div<int64_t>(args.hidden_size, kTileK<T>));

  TileScheduler<kTileM, C::kTileN> scheduler(args.lists, args.expert_offsets, args.num_experts,
                                             args.group_size, min_size, max_size);
  typename TileScheduler<kTileM, C::kTileN>::Tile tile;
  while (scheduler.next(tile)) {
    CopiedRows<T, C::kCopiesA + C::kCopiesB> from;
#pragma unroll
    for (int i = 0; i < C::kCopiesA; ++i) {
      const int pair = tile.pairs.begin + copy_row + i * kCopyRows;
      const bool exists = pair < tile.pairs.end;
      from.set(i, exists, args.x + (exists ? args.lists.token_idx[pair] * args.x_stride : 0));
    }
#pragma unroll
    for (int i = 0; i < C::kCopiesB; ++i) {
      const int row = copy_row + i * kCopyRows;
      const WeightRows<const T>& weights = row < C::kTileN ? args.gate_proj : args.up_proj;
      const int within = row % C::kTileN;
      from.set(C::kCopiesA + i, within < tile.columns,
               weights.at(tile.expert, tile.first_row + within));
    }
    auto load = [&](int stage, int step) {
      const uint32_t to = base + stage * C::kStageBytes;
      const int64_t k = step * int64_t{kTileK<T>} + chunk * kNumbers<T>;
      const uint32_t exist = k < args.hidden_size ? from.exist : 0;
      auto copy = [&](uint32_t at, int i) { cp_async_16(at, from.row[i] + k, exist >> i & 1); };
#pragma unroll
      for (int i = 0; i < C::kCopiesA; ++i) {
        copy(to + RowTile::offset(copy_row + i * kCopyRows, chunk), i);
      }
#pragma unroll
      for (int i = 0; i < C::kCopiesB; ++i) {
        const int row = copy_row + i * kCopyRows;
        const uint32_t matrix = C::kRowsBytes + row / C::kTileN * C::kColumnsBytes;
        copy(to + matrix + C::Columns::offset(row % C::kTileN, chunk), C::kCopiesA + i);
      }
    };
    GateUpSums<T, C> sums{};
    const int live = live_blocks<C::kWarpsM>(tile.pairs.count(), warp_m);
    pipeline(num_steps, load, [&](int stage) {
      gate_up_step(sums, base + stage * C::kStageBytes, warp_m, warp_n, live);
    });
    gate_up_epilogue<T, C>(args, tile, sums, warp_m, warp_n);
  }
}

}  // namespace dsmoe::cuda

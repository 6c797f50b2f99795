// The backward per neuron: from x_t and dy_t to what every gradient is made of.        see expert_mlp_bwd.cu
//
//   g = x_t Wg,  u = x_t Wu,  da = dy_t Wd^T          three products over H, rows gathered by token_idx
//   a = act(g) u                                         activation.cuh
//   gated [t,i] = G a              dgate [t,i] = G da u act'(g)                   dup [t,i] = G da act(g)
//   partial [t, ..] = sum over 32 neurons of a da                                 its sum is dgates
//
// 96 pairs x 64 neurons: three sums of 48 registers each leave room for two CTAs per SM (so does the shared
// memory of sm_80 and sm_90), and L2 can bring a step's operands while the tensor cores work on the step
// before. A warp sees 32 neurons at a time, so that a row's part of dgates stays in four lanes. Where the
// forward saved g and u of the active pairs, da alone is a product, of 128 pairs x 128 neurons. Experts that
// fill at most half of these columns get 128 pairs x 32 neurons, saved 64.
#pragma once

#include "cuda/gemm_gate_up.cuh"

namespace dsmoe::cuda {

template <class T>
struct NeuronsArgs {
  PassArgs<T> pass;
  PairLists listed;  // pairs to compute: active ones, those that want dgates all the same, or both
  const T* saved;    // [Tp,2,I]   what the forward kept of active pairs, or null
  int64_t dy_stride;
  const T* dy;                      // [Tp,H]
  WeightRows<const T> down_proj_t;  // [I,H]
  T* gated;                         // [Tp,width]
  T* dgate;                         // [Tp,width]
  T* dup;                           // [Tp,width]
  float* partial;                   // [Tp,width/16]   at column / 16 of the first of 32 neurons
  const float* grad_weight;         // [Tp,E] or null
  float* dgates;                    // [Tp,E] or null
};

// Neurons whose parts of dgates are summed up before they are stored.
constexpr int kPartialColumns = 32;

template <class T, bool kFromSaved, int kWarpsAlongN>
struct NeuronsTile {
  static constexpr bool kSaved = kFromSaved;
  static constexpr int kWarpsN = kWarpsAlongN, kWarpsM = kThreads / kWarp / kWarpsN;
  static constexpr int kTileM = !kSaved && kWarpsN > 1 ? 96 : 128;
  static constexpr int kParts = kSaved ? 2 : 1;  // of 32 neurons: what a warp has
  static constexpr int kTileN = kWarpsN * kParts * kPartialColumns;
  static constexpr int kRowBlocks = kTileM / 16 / kWarpsM;
  static constexpr int kBlocks = kPartialColumns / 8;  // 4
  static constexpr int kGroup = kTogether<T, kBlocks>;
  using Columns = ColumnTile<kGroup>;
  static constexpr int kSources = kSaved ? 1 : 2;   // dy, x
  static constexpr int kProducts = kSaved ? 2 : 3;  // with Wd and Wd; with Wd, Wg, Wu
  static constexpr int kRowsBytes = kTileM * kRowBytes;
  // boxes of 32 rows of weights: a product's for all warps, or where there is one, a warp's for its parts
  static constexpr int kBoxes = kWarpsN * kProducts;
  static constexpr int kBoxBytes = kPartialColumns * kRowBytes;
  static constexpr int kBoxesAt = kSources * kRowsBytes;
  static constexpr int kStageBytes = kBoxesAt + kBoxes * kBoxBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;  // 72 KiB; saved: 48; narrow: 66, 36
  static constexpr int kCopiesA = kTileM / kCopyRows;
  static_assert(kPartialColumns == kCopyRows, "a thread copies one row of each box");
  static __device__ __forceinline__ int box(int product, int warp_n) {
    return kSaved ? warp_n * kParts + product : product * kWarpsN + warp_n;
  }
};

template <class C>
using NeuronsSums = float[C::kProducts][C::kRowBlocks][C::kBlocks][4];

template <class T, class C>
__device__ __forceinline__ void neurons_step(NeuronsSums<C>& sums, uint32_t stage, int warp_m,
                                             int warp_n, int live) {
#pragma unroll
  for (int k_chunk = 0; k_chunk < kChunksPerRow; k_chunk += 2) {
    uint32_t rows[C::kSources][C::kRowBlocks][4];
#pragma unroll
    for (int i = 0; i < C::kRowBlocks; ++i) {
      if (i >= live) continue;
#pragma unroll
      for (int s = 0; s < C::kSources; ++s) {
        load_rows(rows[s][i], stage + s * C::kRowsBytes, (i * C::kWarpsM + warp_m) * 16, k_chunk);
        round_operands(rows[s][i], T());
      }
    }
#pragma unroll
    for (int j = 0; j < C::kBlocks; j += 2) {
      const uint32_t at = stage + C::kBoxesAt + C::Columns::lane_offset(0, j, k_chunk);
      uint32_t columns[C::kProducts][4];
#pragma unroll
      for (int p = 0; p < C::kProducts; ++p) {
        ldmatrix_x4(columns[p], at + C::box(p, warp_n) * C::kBoxBytes);
        round_operands(columns[p], T());
      }
#pragma unroll
      for (int i = 0; i < C::kRowBlocks; ++i) {
        if (i >= live) continue;
#pragma unroll
        for (int b = 0; b < 2; ++b) {
#pragma unroll
          for (int p = 0; p < C::kProducts; ++p) {
            const uint32_t (&left)[4] = rows[p > 0 ? C::kSources - 1 : 0][i];
            mma(sums[p][i][j + b], left, columns[p][2 * b], columns[p][2 * b + 1], T());
          }
        }
      }
    }
  }
}

// What the gradients are made of, for one neuron and one token.
struct Neuron {
  float gated, dgate, dup, dot;
  __device__ __forceinline__ Neuron(const Activated& act, float u, float da, float weight) {
    const float a = act.value * u;
    // not products with a gate of 0: what an inactive pair computed may be infinite
    const bool is_active = weight != 0.f;
    gated = is_active ? weight * a : 0.f;
    dgate = is_active ? weight * da * u * act.slope : 0.f;
    dup = is_active ? weight * da * act.value : 0.f;
    dot = a * da;
  }
};

// The column, from its first one on, of a lane's i-th neuron; four lanes have 32 of them.
template <class T>
__device__ __forceinline__ constexpr int column_of(int i) {
  return i / kNumbers<T> * 4 * kNumbers<T> + i % kNumbers<T>;
}

// Eight neurons of a token, from column `at` of the workspace on; of 32 in four lanes. Those before column
// `count` exist, the rest are zeros.
template <class T, class Kept>
__device__ __forceinline__ void store_neurons(const NeuronsArgs<T>& args, int64_t at, int count,
                                              float weight, const Kept (&gates)[kChunk],
                                              const Kept (&ups)[kChunk],
                                              const float (&das)[kChunk]) {
  constexpr int kMine = kNumbers<T>;  // neighbours
  Neighbours<T, kMine> gated[kChunk / kMine], dgate[kChunk / kMine], dup[kChunk / kMine];
  float dot = 0.f;
#pragma unroll
  for (int j = 0; j < kChunk / 2; ++j) {
    auto neuron = [&](int i) {
      const bool exists = column_of<T>(i) < count;
      const Activated act = args.pass.logistic.both(to_float(gates[i]));
      Neuron made(act, to_float(ups[i]), das[i], exists ? weight : 0.f);
      if (!exists) made.dot = 0.f;
      return made;
    };
    const Neuron low = neuron(2 * j), high = neuron(2 * j + 1);
    dot += low.dot;
    dot += high.dot;
    const int group = 2 * j / kMine, two = j % (kMine / 2);
    gated[group].set(two, low.gated, high.gated);
    dgate[group].set(two, low.dgate, high.dgate);
    dup[group].set(two, low.dup, high.dup);
  }
  dot += __shfl_xor_sync(kAllLanes, dot, 1);
  dot += __shfl_xor_sync(kAllLanes, dot, 2);
  if (count <= 0) return;
  if (threadIdx.x % 4 == 0) args.partial[at / kColumnAlign] = dot;
#pragma unroll
  for (int group = 0; group < kChunk / kMine; ++group) {
    const int column = column_of<T>(group * kMine);
    if (column >= count) continue;
    gated[group].store(args.gated + at + column);
    dgate[group].store(args.dgate + at + column);
    dup[group].store(args.dup + at + column);
  }
}

// Part kPart of a warp's neurons: 32, of which a lane has 8 of every row.
template <class C, int kPart, class T, class Tile>
__device__ __forceinline__ void neurons_epilogue(const NeuronsArgs<T>& args, const Tile& tile,
                                                 const NeuronsSums<C>& sums, int warp_m,
                                                 int warp_n) {
  static_assert(2 * C::kBlocks == kChunk);
  const PassArgs<T>& pass = args.pass;
  const int lane = threadIdx.x % kWarp;
  const int column = (warp_n * C::kParts + kPart) * kPartialColumns + lane % 4 * kNumbers<T>;
  const int64_t tile_column = pass.expert_columns[tile.expert] + tile.column;
#pragma unroll
  for (int i = 0; i < C::kRowBlocks; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (i * C::kWarpsM + warp_m) * 16 + half * 8 + lane / 4;
      const bool exists = row < tile.pairs.count();
      const int64_t token = exists ? args.listed.token_idx[tile.pairs.begin + row] : 0;
      const float weight = exists ? pass.gates[token * pass.num_experts + tile.expert] : 0.f;
      const int count = exists ? tile.columns - column : 0;
      float gates[kChunk], ups[kChunk], das[kChunk];
      if constexpr (C::kSaved) {
        const T* saved = args.saved + token * 2 * pass.intermediate_size + tile.first_row + column;
#pragma unroll
        for (int b = 0; b < kChunk; b += kNumbers<T>) {
          float g[kNumbers<T>], u[kNumbers<T>];
          const int at = column_of<T>(b);
          load_saved(g, saved + at, count - at);
          load_saved(u, saved + pass.intermediate_size + at, count - at);
#pragma unroll
          for (int c = 0; c < kNumbers<T>; ++c) {
            gates[b + c] = g[c];
            ups[b + c] = u[c];
          }
        }
      }
#pragma unroll
      for (int b = 0; b < kChunk; ++b) {
        const int j = b / 2, at = half * 2 + b % 2;
        if constexpr (!C::kSaved) {
          gates[b] = sums[C::kProducts - 2][i][j][at];
          ups[b] = sums[C::kProducts - 1][i][j][at];
        }
        das[b] = sums[kPart][i][j][at];
      }
      const int64_t at = token * pass.width + tile_column + column;
      store_neurons(args, at, count, weight, gates, ups, das);
    }
  }
}

template <class T, class C>
__global__ void __launch_bounds__(kThreads, 2)
    neurons_backward_kernel(const __grid_constant__ NeuronsArgs<T> args, int min_size,
                            int max_size) {
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const PassArgs<T>& pass = args.pass;
  const int t = threadIdx.x, warp_m = t / kWarp / C::kWarpsN, warp_n = t / kWarp % C::kWarpsN;
  const int chunk = t % kChunksPerRow, copy_row = t / kChunksPerRow;
  const int num_steps = static_cast<int>(ceil_div<int64_t>(pass.hidden_size, kTileK<T>));
  TileScheduler<C::kTileM, C::kTileN> scheduler(args.listed, pass.expert_offsets, pass.num_experts,
                                                pass.group_size, min_size, max_size);
  typename TileScheduler<C::kTileM, C::kTileN>::Tile tile;
  while (scheduler.next(tile)) {
    CopiedRows<T, C::kCopiesA> rows[C::kSources];
#pragma unroll
    for (int i = 0; i < C::kCopiesA; ++i) {
      const int pair = tile.pairs.begin + copy_row + i * kCopyRows;
      const bool exists = pair < tile.pairs.end;
      const int64_t token = exists ? args.listed.token_idx[pair] : 0;
      rows[0].set(i, exists, args.dy + token * args.dy_stride);
      if (!C::kSaved) rows[C::kSources - 1].set(i, exists, pass.x + token * pass.x_stride);
    }
    CopiedRows<T, C::kBoxes> columns;
#pragma unroll
    for (int box = 0; box < C::kBoxes; ++box) {
      const int product = C::kSaved ? 0 : box / C::kWarpsN;
      const int row = copy_row + (C::kSaved ? box : box % C::kWarpsN) * kPartialColumns;
      const WeightRows<const T>& matrix = product == 0   ? args.down_proj_t
                                          : product == 1 ? pass.gate_proj
                                                         : pass.up_proj;
      columns.set(box, row < tile.columns, matrix.at(tile.expert, tile.first_row + row));
    }
    auto load = [&](int stage, int step) {
      const int64_t k = step * int64_t{kTileK<T>} + chunk * kNumbers<T>;
      const uint32_t all = k < pass.hidden_size ? UINT32_MAX : 0;
      auto copy = [&](uint32_t at, const auto& from, int i) {
        const bool exists = (from.exist & all) >> i & 1;
        cp_async_16(base + stage * C::kStageBytes + at, from.row[i] + k, exists);
      };
#pragma unroll
      for (int i = 0; i < C::kCopiesA; ++i) {
        const uint32_t at = RowTile::offset(copy_row + i * kCopyRows, chunk);
#pragma unroll
        for (int s = 0; s < C::kSources; ++s) copy(at + s * C::kRowsBytes, rows[s], i);
      }
      const uint32_t at = C::kBoxesAt + C::Columns::offset(copy_row, chunk);
#pragma unroll
      for (int box = 0; box < C::kBoxes; ++box) copy(at + box * C::kBoxBytes, columns, box);
    };
    NeuronsSums<C> sums{};
    const int live = live_blocks<C::kWarpsM>(tile.pairs.count(), warp_m);
    pipeline(num_steps, load, [&](int stage) {
      neurons_step<T, C>(sums, base + stage * C::kStageBytes, warp_m, warp_n, live);
    });
    neurons_epilogue<C, 0>(args, tile, sums, warp_m, warp_n);
    if constexpr (C::kParts == 2) neurons_epilogue<C, 1>(args, tile, sums, warp_m, warp_n);
  }
}

// dgates [t,e]: the sum of a listed pair's parts, times grad_weight where it is inactive. A thread per pair.
template <class T>
__global__ void sum_dgates_kernel(const __grid_constant__ NeuronsArgs<T> args) {
  const PassArgs<T>& pass = args.pass;
  const int64_t count = pass.num_tokens * pass.num_experts;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += gridDim.x * int64_t{blockDim.x}) {
    const int64_t token = i / pass.num_experts;
    const int expert = static_cast<int>(i - token * pass.num_experts);
    const bool is_active = pass.gates[i] != 0.f;
    const float weight = is_active ? 1.f : args.grad_weight != nullptr ? args.grad_weight[i] : 0.f;
    float sum = 0.f;
    if (weight != 0.f) {
      const int size = pass.expert_offsets[expert + 1] - pass.expert_offsets[expert];
      const float* parts =
          args.partial + (token * pass.width + pass.expert_columns[expert]) / kColumnAlign;
      for (int c = 0; c < size; c += kPartialColumns) sum += parts[c / kColumnAlign];
      sum *= weight;
    }
    args.dgates[i] = pass.turn.is_first ? sum : args.dgates[i] + sum;
  }
}

}  // namespace dsmoe::cuda

// The weight gradients on sm_90a: dW[i, :] = sum over the active tokens t of e of p[t,i] q_t   see sm90a/backward.cu
//
//   left     neurons of one expert, columns of p, rows gathered   [256, tokens]
//   right    q = x or dy, rows gathered                           [tokens, 192]
//   result   rows of dW                                           [256, 192]
//
// The lines of both operands are as memory has them, 64 columns of one token, across the sum. Both are
// gathered, which the copy engine cannot do: seven panels of 64 tokens by 64 columns, by cp.async.
//
// One launch makes all the gradients that are wanted: of the last wave of tiles a part of the SMs has
// none, and one such wave costs less than three. 192 sums of a thread and where they go take 232
// registers; the copies, whose addresses are two for a term, get by on 40.
#pragma once

#include "cuda/gemm_weights.cuh"
#include "cuda/sm90a/pipeline.cuh"

namespace dsmoe::cuda::sm90a {

constexpr int kGradientColumns = 192;
using GradientTiles = NeuronTiles<kMaxRows, kGradientColumns>;
constexpr int kPanels = kGradientColumns / kTerms;  // of q
constexpr int kTermCopies = kTerms / kRowsAtOnce;   // terms of a step that a thread copies
static_assert(kPanels * kBlockBytes == kWeightsBytes);

// All gradients' columns stand side by side in the tiles: which gradient is one of them of? Asked anew where it is
// needed, since it would take a register.
template <class T>
__device__ __forceinline__ const WeightsArgs<T>& gradient_at(const AllWeights<T>& all, int width,
                                                             int& column) {
  int which = 0;
  for (; column >= width; column -= width) ++which;
  return all.of[which];
}

template <class T>
__device__ __forceinline__ void fetch_terms(Producer& producer, const WeightsArgs<T>& args,
                                            const GradientTiles::Tile& tile,
                                            const PairRange& pairs) {
  const PassArgs<T>& pass = args.pass;
  const int t = threadIdx.x % kGroup, chunk = t % kChunks, first_term = t / kChunks;
  const int p_panels = blocks_of(tile.neurons), p_column = tile.neuron + chunk * kChunk;
  const T* p = args.p + pass.expert_columns[tile.expert] + p_column;
  const T* q = args.q + tile.column + chunk * kChunk;
  const int p_columns = tile.neurons - chunk * kChunk;  // from here on
  const int q_columns = static_cast<int>(pass.hidden_size) - tile.column - chunk * kChunk;
  int ahead[kTermCopies];  // tokens of the next step's terms: the copies need them at once
  auto look_up = [&](int first) {
#pragma unroll
    for (int i = 0; i < kTermCopies; ++i) {
      const int pair = first + first_term + i * kRowsAtOnce;
      ahead[i] = pair < pairs.end ? pass.lists.token_idx[pair] : -1;
    }
  };
  look_up(pairs.begin);
  for (int first = pairs.begin; first < pairs.end; first += kTerms) {
    producer.begin(0);
#pragma unroll
    for (int i = 0; i < kTermCopies; ++i) {
      const int term = first_term + i * kRowsAtOnce;
      const uint32_t to = producer.stage() + term * kLine + (chunk ^ term % 8) * 16;
      const bool is_term = ahead[i] >= 0;
      const int of_p = is_term ? p_columns : 0, of_q = is_term ? q_columns : 0;
      const uint32_t token = ahead[i];
      const T* p_row = p + uint64_t{token} * static_cast<uint32_t>(pass.width);
      const T* q_row = q + uint64_t{token} * args.q_stride;
#pragma unroll
      for (int panel = 0; panel < kMaxRows / kBlockRows; ++panel) {
        if (panel >= p_panels) break;
        cp_async_16(to + panel * kBlockBytes, p_row + panel * kTerms, panel * kTerms < of_p);
      }
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        cp_async_16(to + kRowsBytes + panel * kBlockBytes, q_row + panel * kTerms,
                    panel * kTerms < of_q);
      }
    }
    look_up(first + kTerms);
    producer.end();
  }
}

template <int kBlocks, class T, class Sum>
__device__ __forceinline__ void store_row(const GradientRow<T>& row, Sum sum) {
#pragma unroll
  for (int j = 0; j < kBlocks; j += 4) {
    float quad[4][2];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      quad[b][0] = sum(j + b, 0);
      quad[b][1] = sum(j + b, 1);
    }
    row.store(j, quad);
  }
}

// Sums of the passes before can neither be what these begin with, as in other main loops, nor be read at the end: 192
// sums leave no registers. So a later pass adds to them where they wait, and the last one then reads rows of results,
// by when its sums are gone.
template <class T, int kLive>
__device__ __forceinline__ void make_gradient(const AllWeights<T>& all, int width,
                                              const GradientTiles::Tile& tile, Ring& ring,
                                              int num_steps) {
  constexpr int kBlocks = kGradientColumns / 8;
  float sums[kLive][kGradientColumns / 2]{};
  multiply<T, 1, 1>(ring, num_steps, sums);
  int column = tile.column;
  const WeightsArgs<T>& args = gradient_at(all, width, column);
  auto row_of = [&](int block, int half) {
    const int neuron = row_of_sums(block, half);
    return GradientRow<T>(args, tile.first_row + neuron, column, neuron < tile.neurons);
  };
  // act(row, its sum i of the lane's two in block j) for every row that the lane has sums of
  auto for_each_row = [&](auto act) {
#pragma unroll
    for (int block = 0; block < kLive; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        act(row_of(block, half), [&](int j, int i) { return sums[block][j * 4 + half * 2 + i]; });
      }
    }
  };
  if (args.turn.is_first) {
    for_each_row([](const GradientRow<T>& row, auto sum) { store_row<kBlocks>(row, sum); });
    return;
  }
  for_each_row([](const GradientRow<T>& row, auto sum) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      if (j * 8 < row.columns) {
        atomicAdd(reinterpret_cast<float2*>(row.waiting + j * 8), float2{sum(j, 0), sum(j, 1)});
      }
    }
  });
  if (!args.turn.is_last) return;
#pragma unroll 1
  for (int i = 0; i < kLive * 2; ++i) {
    const GradientRow<T> row = row_of(i / 2, i % 2);
    float2 whole[kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) whole[j] = row.load(j);
    store_row<kBlocks>(row, [&](int j, int i) { return i == 0 ? whole[j].x : whole[j].y; });
  }
}

// This CTA's tiles of all the gradients: act(tile, the expert's pairs).
template <class T, class Act>
__device__ __forceinline__ void for_each_tile(const AllWeights<T>& all,
                                              const GradientTiles::ColumnTiles& columns, Act act) {
  const PassArgs<T>& pass = all.of[0].pass;
  GradientTiles tiles(pass.expert_offsets, pass.num_experts, columns);
  GradientTiles::Tile tile;
  while (tiles.next(tile)) {
    const int32_t* offsets = pass.lists.pair_offsets + tile.expert;
    act(tile, PairRange{offsets[0], offsets[1]});
  }
}

// columns: of all gradients; width: of one of them, in whole tiles.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    weights_kernel(const __grid_constant__ AllWeights<T> all,
                   const __grid_constant__ GradientTiles::ColumnTiles columns, int width) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  make_mbarriers(base);
  if (threadIdx.x >= kConsumers) {
    Registers<40, 232>::fetch();
    Producer producer(base);
    for_each_tile(all, columns, [&](GradientTiles::Tile tile, const PairRange& pairs) {
      const WeightsArgs<T>& args = gradient_at(all, width, tile.column);
      fetch_terms(producer, args, tile, pairs);
    });
    producer.finish();
    return;
  }
  Registers<40, 232>::multiply();
  Ring ring(base);
  for_each_tile(all, columns, [&](const GradientTiles::Tile& tile, const PairRange& pairs) {
    const int num_steps = ceil_div(pairs.count(), kTerms);
    const int live = live_blocks(tile.neurons, threadIdx.x / kGroup);
    if (live == 2) {
      make_gradient<T, 2>(all, width, tile, ring, num_steps);
    } else if (live == 1) {
      make_gradient<T, 1>(all, width, tile, ring, num_steps);
    } else {
      pass_by(ring, num_steps);
    }
  });
}

}  // namespace dsmoe::cuda::sm90a

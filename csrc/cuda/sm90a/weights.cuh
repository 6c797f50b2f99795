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
      const int64_t token = is_term ? ahead[i] : 0;
      const T *p_row = p + token * pass.width, *q_row = q + token * args.q_stride;
      auto copy = [&](uint32_t at, const T* row, int panel, int columns) {
        const bool exists = is_term && panel * kTerms < columns;
        cp_async_16(at + panel * kBlockBytes, exists ? row + panel * kTerms : args.q, exists);
      };
#pragma unroll
      for (int panel = 0; panel < kMaxRows / kBlockRows; ++panel) {
        if (panel < p_panels) copy(to, p_row, panel, p_columns);
      }
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) copy(to + kRowsBytes, q_row, panel, q_columns);
    }
    look_up(first + kTerms);
    producer.end();
  }
}

template <class T, int kLive>
__device__ __forceinline__ void make_gradient(const WeightsArgs<T>& args,
                                              const GradientTiles::Tile& tile, Ring& ring,
                                              int num_steps) {
  float sums[kLive][kGradientColumns / 2]{};
  multiply<T, 1, 1>(ring, num_steps, sums);
#pragma unroll
  for (int block = 0; block < kLive; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int neuron = row_of_sums(block, half);
      const GradientRow<T> row(args, tile.first_row + neuron, tile.column, neuron < tile.neurons);
#pragma unroll
      for (int j = 0; j < kGradientColumns / 8; j += 4) {
        float quad[4][2];
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          quad[b][0] = sums[block][(j + b) * 4 + half * 2];
          quad[b][1] = sums[block][(j + b) * 4 + half * 2 + 1];
        }
        row.store(j, quad);
      }
    }
  }
}

// This CTA's tiles of all the gradients: act(args, tile, the expert's pairs).
template <class T, class Act>
__device__ __forceinline__ void for_each_gradient(const AllWeights<T>& all, Act act) {
  const PassArgs<T>& pass = all.of[0].pass;
  GradientTiles tiles(pass.expert_offsets, pass.num_experts, pass.group_size, pass.hidden_size);
  for (int i = 0; i < all.count; ++i, tiles.restart()) {
    GradientTiles::Tile tile;
    while (tiles.next(tile)) {
      const int32_t* offsets = pass.lists.pair_offsets + tile.expert;
      act(all.of[i], tile, PairRange{offsets[0], offsets[1]});
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    weights_kernel(const __grid_constant__ AllWeights<T> all) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  make_mbarriers(base);
  if (threadIdx.x >= kConsumers) {
    Registers<40, 232>::fetch();
    Producer producer(base);
    for_each_gradient(all,
                      [&](const WeightsArgs<T>& args, const GradientTiles::Tile& tile,
                          const PairRange& pairs) { fetch_terms(producer, args, tile, pairs); });
    producer.finish();
    return;
  }
  Registers<40, 232>::multiply();
  Ring ring(base);
  for_each_gradient(all, [&](const WeightsArgs<T>& args, const GradientTiles::Tile& tile,
                             const PairRange& pairs) {
    const int num_steps = ceil_div(pairs.count(), kTerms);
    const int live = live_blocks(tile.neurons, threadIdx.x / kGroup);
    if (live == 2) {
      make_gradient<T, 2>(args, tile, ring, num_steps);
    } else if (live == 1) {
      make_gradient<T, 1>(args, tile, ring, num_steps);
    } else {
      pass_by(ring, num_steps);
    }
  });
}

}  // namespace dsmoe::cuda::sm90a

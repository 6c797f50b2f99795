// Gathered rows times rows of weights, the sum running over H: what gate_up and the backward's neurons
// are made of.                                                                    see sm90a/forward.cu
//
//   rows     pairs of one expert, x or dy gathered by token_idx   [256, H]
//   columns  two boxes of weights, one below the other            [2 kColumns, H]
//   result   handed to finish(tile, sums)                         [256, 2 kColumns] fp32
//
// The boxes are the same rows of two matrices, or neighbouring rows of one: a tile has kColumns neurons
// or twice as many. Rows of weights beyond the expert's end belong to the next expert: what they give
// must never be stored.
#pragma once

#include "cuda/sm90a/even_tiles.cuh"

namespace dsmoe::cuda::sm90a {

// The lane keeps one of two registers, and gets the same one of its neighbour's: two blocks' columns
// become neighbours.
template <class Word>
__device__ __forceinline__ void exchange(Word& low, Word& high, int step) {
  const bool keeps_high = threadIdx.x & step;
  const Word got = __shfl_xor_sync(kAllLanes, keeps_high ? low : high, step);
  (keeps_high ? low : high) = got;
}

// Of pairs of columns of so many blocks, the same in each: neighbours. Returns the first one's column.
template <class Word>
__device__ __forceinline__ int make_neighbours(Word (&pairs)[2]) {
  exchange(pairs[0], pairs[1], 1);
  return threadIdx.x % 2 * 8 + threadIdx.x / 2 % 2 * 4;
}
template <class Word>
__device__ __forceinline__ int make_neighbours(Word (&pairs)[4]) {
  exchange(pairs[0], pairs[1], 1);
  exchange(pairs[2], pairs[3], 1);
  exchange(pairs[0], pairs[2], 2);
  exchange(pairs[1], pairs[3], 2);
  return threadIdx.x % 4 * 8;
}

// The pair behind rows of a lane's sums.
struct LanePair {
  bool exists;
  int64_t token;
};
template <class Tile>
__device__ __forceinline__ LanePair pair_of_sums(const PairLists& lists, const Tile& tile,
                                                 int block, int half) {
  const int row = row_of_sums(block, half);
  const bool exists = row < tile.pairs.count();
  return {exists, exists ? lists.token_idx[tile.pairs.begin + row] : 0};
}
template <class T>
__device__ __forceinline__ float gate_of(const PassArgs<T>& args, const LanePair& pair,
                                         int expert) {
  return pair.exists ? args.gates[pair.token * args.num_experts + expert] : 0.f;
}

template <int kColumns>
struct Neurons {
  static constexpr int kBlocks = kColumns / 8;                 // of 8 columns, of each matrix
  static constexpr int kTogether = kBlocks < 4 ? kBlocks : 4;  // blocks that lanes exchange
  static constexpr int kBytes = 2 * kColumns * kLine;          // weights of a step
  // 96 columns leave no registers for where g and u go
  static constexpr bool kMaySave = kColumns <= 64;
};

template <class T, int kColumns, int kLive, class Tile, class Finish>
__device__ __forceinline__ void multiply_tile(const Tile& tile, Ring& ring, int num_steps,
                                              Finish finish) {
  float sums[kLive][kColumns]{};
  multiply<T, 0, 0>(ring, num_steps, sums);
  finish(tile, sums);
}

// All tiles of this CTA, of experts of min_size to max_size neurons. x: the matrix whose rows are
// gathered by the lists; gap: of the weights' WeightRows.
template <class T, int kColumns, int kTileColumns, class Finish>
__device__ __forceinline__ void multiply_gathered(const PassArgs<T>& args, const PairLists& lists,
                                                  const T* x, int64_t x_stride,
                                                  const CUtensorMap& upper,
                                                  const CUtensorMap& lower, int gap, int min_size,
                                                  int max_size, Finish finish) {
  static_assert(kTileColumns == kColumns || kTileColumns == 2 * kColumns);
  // the end of a tile of 160 neurons is the longest
  constexpr bool kLong = kTileColumns == 160;
  using Split = Registers<kLong ? 40 : 56, kLong ? 232 : 224>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  make_mbarriers(base);
  using Scheduler = EvenTiles<kTileColumns>;
  Scheduler scheduler(lists, args.expert_offsets, args.num_experts, args.group_size, min_size,
                      max_size);
  typename Scheduler::Tile tile;

  if (threadIdx.x >= kConsumers) {
    Split::fetch();
    Producer producer(base);
    const int first = threadIdx.x % kGroup / kChunks, chunk = threadIdx.x % kChunks;
    while (scheduler.next(tile)) {
      const int rows = blocks_of(tile.pairs.count()) * kBlockRows;
      GatheredRows from;
#pragma unroll
      for (int i = 0; i < kRowCopies; ++i) {
        const int pair = tile.pairs.begin + first + i * kRowsAtOnce;
        const bool exists = pair < tile.pairs.end;
        from.set(i, exists, exists ? lists.token_idx[pair] : 0, x_stride);
      }
      for (int k = 0; k < args.hidden_size; k += kTerms) {
        if (producer.begin(Neurons<kColumns>::kBytes)) {
          const uint32_t to = producer.stage() + kRowsBytes;
          const int row = tile.first_row + tile.expert * gap;
          copy_box(to, upper, row, k, producer.full());
          copy_box(to + kColumns * kLine, lower, row + kTileColumns - kColumns, k, producer.full());
        }
        copy_rows(producer.stage(), rows, k + chunk * kChunk < args.hidden_size, x + k, from);
        producer.end();
      }
    }
    producer.finish();
  } else {
    Split::multiply();
    Ring ring(base);
    const int num_steps = static_cast<int>(ceil_div<int64_t>(args.hidden_size, kTerms));
    while (scheduler.next(tile)) {
      const int live = live_blocks(tile.pairs.count(), threadIdx.x / kGroup);
      if (live == 2) {
        multiply_tile<T, kColumns, 2>(tile, ring, num_steps, finish);
      } else if (live == 1) {
        multiply_tile<T, kColumns, 1>(tile, ring, num_steps, finish);
      } else {
        pass_by(ring, num_steps);
      }
    }
  }
}

}  // namespace dsmoe::cuda::sm90a

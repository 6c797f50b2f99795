// Ragged experts as iterators: a kernel says `while (scheduler.next(tile))` and never sees the lists.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/permute.cuh"

namespace dsmoe::cuda {

// Experts' columns in the activation workspace start at multiples of this: whole sectors of 32 bytes,
// and copies of 16 bytes, whatever the sizes are. Multiples of 16 as sizes leave no gap.
constexpr int kColumnAlign = 16;

// The active pairs of one expert, or of one expert within a chunk of tokens.
struct PairRange {
  int begin, end;
  __device__ int count() const { return end - begin; }
};

// Those of `chunks` chunks, as far as there are any.
__device__ __forceinline__ PairRange chunk_pairs(const PairLists& lists, int expert, int64_t chunk,
                                                 int chunks = 1) {
  const int32_t* before = lists.tables.counts + expert * lists.tables.num_chunks;
  const int first = lists.pair_offsets[expert];
  const bool is_last = chunk + chunks >= lists.tables.num_chunks;
  return {first + before[chunk],
          is_last ? lists.pair_offsets[expert + 1] : first + before[chunk + chunks]};
}

// Tiles of kTileM pairs by kTileN columns over all experts whose size is in [min_size, max_size], dealt
// out to the CTAs in turn: of every expert the first group_size pairs, then of every expert the next ones. Those
// of one expert share its weights, and those of all experts are of about the same tokens, whose rows of x
// stay in L2 meanwhile: otherwise many small experts would each fetch them anew.
template <int kTileM, int kTileN>
class TileScheduler {
 public:
  struct Tile {
    int expert;
    int first_row;    // of the weights
    int columns;      // columns from here to the expert's end
    int column;       // first column within the expert
    PairRange pairs;  // at most kTileM
  };

  __device__ TileScheduler(const PairLists& lists, const int32_t* expert_offsets, int num_experts,
                           int group_size, int min_size, int max_size)
      : index_(blockIdx.x),
        row_tiles_at_once_(max(group_size / kTileM, 1)),
        lists_(lists),
        expert_offsets_(expert_offsets),
        num_experts_(num_experts),
        min_size_(min_size),
        max_size_(max_size) {}

  __device__ bool next(Tile& tile) {
    do {
      for (; expert_ < num_experts_; ++expert_) {
        const auto [first_row, size, all, row_tiles, column_tiles] = at(expert_);
        const int rows_in_group = max(0, min(row_tiles_at_once_, row_tiles - first_row_tile_));
        const int num_tiles = rows_in_group * column_tiles;
        if (index_ < num_tiles) {
          const int row_tile = first_row_tile_ + index_ % rows_in_group;
          tile.expert = expert_;
          tile.column = index_ / rows_in_group * kTileN;
          tile.columns = size - tile.column;
          tile.first_row = first_row + tile.column;
          tile.pairs.begin = all.begin + row_tile * kTileM;
          tile.pairs.end = min(all.end, tile.pairs.begin + kTileM);
          index_ += gridDim.x;
          return true;
        }
        index_ -= num_tiles;
      }
      expert_ = 0;
      first_row_tile_ += row_tiles_at_once_;
    } while (any_has(first_row_tile_));
    return false;
  }

 protected:
  // Of all CTAs. The lanes of a warp count together.
  __device__ int count_tiles() const {
    int count = 0;
    for (int e = threadIdx.x % kWarp; e < num_experts_; e += kWarp) {
      const Expert expert = at(e);
      count += expert.row_tiles * expert.column_tiles;
    }
    return __shfl_sync(kAllLanes, warp_inclusive_sum(count), kWarp - 1);
  }

  int index_;  // of the next tile, counted from the current expert's first

 private:
  struct Expert {
    int first_row, size;
    PairRange pairs;
    int row_tiles, column_tiles;  // none where another kernel takes this size
  };
  __device__ Expert at(int expert) const {
    const int first_row = expert_offsets_[expert];
    const int size = expert_offsets_[expert + 1] - first_row;
    const PairRange pairs{lists_.pair_offsets[expert], lists_.pair_offsets[expert + 1]};
    const bool mine = size >= min_size_ && size <= max_size_;
    return {first_row, size, pairs, mine ? ceil_div(pairs.count(), kTileM) : 0,
            ceil_div(size, kTileN)};
  }

  // Is there an expert with so many row tiles and more? The lanes of a warp look together.
  __device__ bool any_has(int row_tiles) const {
    bool found = false;
#pragma unroll 1
    for (int e = threadIdx.x % kWarp; e < num_experts_; e += kWarp) {
      found = found || at(e).row_tiles > row_tiles;
    }
    return __any_sync(kAllLanes, found);
  }

  int row_tiles_at_once_;
  const PairLists& lists_;
  const int32_t* expert_offsets_;
  int num_experts_, min_size_, max_size_;
  int expert_ = 0, first_row_tile_ = 0;
};

// Tiles of kTileM neurons of one expert by kTileN columns of H, for all experts, dealt out in turn: of
// every expert the first group_size columns, then of every expert the next ones, so that these columns of all
// tokens stay in L2.
template <int kTileM, int kTileN>
class NeuronTiles {
 public:
  struct Tile {
    int expert;
    int neuron;     // first neuron within the expert
    int neurons;    // at most kTileM
    int first_row;  // of the weights
    int column;     // first column
  };

  __device__ NeuronTiles(const int32_t* expert_offsets, int num_experts, int group_size,
                         int64_t hidden_size)
      : NeuronTiles(expert_offsets, num_experts, ColumnTiles(group_size, hidden_size)) {}

  // Along H: those that come before the next ones, and all. From the host where a kernel has no register for them.
  struct ColumnTiles {
    int at_once, all;
    ColumnTiles() = default;
    __host__ __device__ ColumnTiles(int group_size, int64_t hidden_size)
        : at_once(group_size < kTileN ? 1 : group_size / kTileN),
          all(static_cast<int>(ceil_div<int64_t>(hidden_size, kTileN))) {}
  };
  __device__ NeuronTiles(const int32_t* expert_offsets, int num_experts, ColumnTiles columns)
      : column_tiles_at_once_(columns.at_once),
        expert_offsets_(expert_offsets),
        num_experts_(num_experts),
        column_tiles_(columns.all),
        index_(blockIdx.x) {}

  __device__ bool next(Tile& tile) {
    for (; first_column_tile_ < column_tiles_;
         first_column_tile_ += column_tiles_at_once_, expert_ = 0) {
      const int columns_in_group = min(column_tiles_at_once_, column_tiles_ - first_column_tile_);
      for (; expert_ < num_experts_; ++expert_) {
        const int first_row = expert_offsets_[expert_];
        const int size = expert_offsets_[expert_ + 1] - first_row;
        const int num_tiles = ceil_div(size, kTileM) * columns_in_group;
        if (index_ < num_tiles) {
          tile.expert = expert_;
          tile.neuron = index_ / columns_in_group * kTileM;
          tile.neurons = min(kTileM, size - tile.neuron);
          tile.first_row = first_row + tile.neuron;
          tile.column = (first_column_tile_ + index_ % columns_in_group) * kTileN;
          index_ += gridDim.x;
          return true;
        }
        index_ -= num_tiles;
      }
    }
    return false;
  }

 private:
  int column_tiles_at_once_;
  const int32_t* expert_offsets_;
  int num_experts_, column_tiles_;
  int index_;  // of the next tile, counted from the current expert's first
  int expert_ = 0, first_column_tile_ = 0;
};

// Spans of the down projection's sum for one chunk of tokens, in the order of the experts. A large
// expert is a span of its own with the tokens that are active for it. Small experts that follow each
// other form one span over all of the chunk's tokens, with zeros where a pair is inactive: adding to
// the output after every 16 terms of the sum would cost more than the products with zero.
class SpanIterator {
 public:
  static constexpr int kSmall = 64;

  struct Span {
    int first_column, end_column;  // of the activation workspace
    PairRange pairs;               // large: its tokens; small ones: the chunk's tokens themselves
    bool all_tokens;
  };

  // Of a sum in parts: every expert's columns are cut alike, at whole steps of the main loop.
  struct Part {
    int index = 0, count = 1, step = 1;
  };

  __device__ SpanIterator(const PairLists& lists, const int32_t* expert_offsets,
                          const int32_t* expert_columns, int num_experts, Part part, int64_t chunk,
                          int chunks = 1)
      : part_(part),
        lists_(lists),
        expert_offsets_(expert_offsets),
        expert_columns_(expert_columns),
        num_experts_(num_experts),
        chunk_(chunk),
        chunks_(chunks) {}

  __device__ bool next(Span& span, int chunk_tokens) {
    while (expert_ < num_experts_) {
      const int expert = expert_++;
      const int size = expert_offsets_[expert + 1] - expert_offsets_[expert];
      if (size == 0) continue;
      span.first_column = expert_columns_[expert];
      span.end_column = span.first_column + size;
      span.all_tokens = size < kSmall;
      span.pairs = span.all_tokens ? PairRange{0, chunk_tokens}
                                   : chunk_pairs(lists_, expert, chunk_, chunks_);
      if (span.pairs.count() == 0) continue;
      if (span.all_tokens) extend(span);
      if (take_part(span)) return true;
    }
    return false;
  }

 private:
  // Is there anything left of it?
  __device__ bool take_part(Span& span) const {
    if (part_.count == 1) return true;
    const int steps = ceil_div(span.end_column - span.first_column, part_.step);
    const int first = steps * part_.index / part_.count;
    const int end = steps * (part_.index + 1) / part_.count;
    span.end_column = min(span.end_column, span.first_column + end * part_.step);
    span.first_column += first * part_.step;
    return first < end;
  }
  __device__ void extend(Span& span) {
    for (; expert_ < num_experts_; ++expert_) {
      const int size = expert_offsets_[expert_ + 1] - expert_offsets_[expert_];
      if (size >= kSmall) break;
      if (size > 0) span.end_column = expert_columns_[expert_] + size;
    }
  }

  Part part_;
  const PairLists& lists_;
  const int32_t* expert_offsets_;
  const int32_t* expert_columns_;
  int num_experts_;
  int64_t chunk_;
  int chunks_;
  int expert_ = 0;
};

}  // namespace dsmoe::cuda

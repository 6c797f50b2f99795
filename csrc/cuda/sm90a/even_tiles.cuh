// Tiles as TileScheduler deals them, but those that make no whole round come first, and if at most half of the CTAs
// would get one, each goes to two neighbours, who take half of its rows.
//
// A CTA has an SM to itself, and a pass of the backward is one or two rounds: T 8192 of Llama-2-7B's FFN makes 188
// tiles of 160 neurons for 132 SMs, of which 76 would idle for a round. A half takes half the products and more than
// half the traffic; quarters would wait for L2. A row's sums are the same whoever makes them.
#pragma once

#include "cuda/sm90a/pipeline.cuh"

namespace dsmoe::cuda::sm90a {

template <int kTileN>
class EvenTiles : public TileScheduler<kMaxRows, kTileN> {
  using Base = TileScheduler<kMaxRows, kTileN>;

 public:
  using Tile = typename Base::Tile;

  __device__ EvenTiles(const PairLists& lists, const int32_t* expert_offsets, int num_experts,
                       int group_size, int min_size, int max_size)
      : Base(lists, expert_offsets, num_experts, group_size, min_size, max_size) {
    this->index_ = kUndecided;
  }

  __device__ bool next(Tile& tile) {
    bool is_half = false;
    int after_half = 0;
    if (this->index_ == kUndecided) {  // here, as a main loop leaves no register for the answer
      const int cta = blockIdx.x, ctas = gridDim.x, odd = this->count_tiles() % ctas;
      is_half = odd * 2 <= ctas && cta < odd * 2;
      this->index_ = is_half ? cta / 2 : odd * 2 <= ctas ? cta + odd : cta;
      after_half = cta + odd - (cta / 2 + ctas);
    }
    while (Base::next(tile)) {
      if (!is_half) return true;
      is_half = false;
      this->index_ += after_half;
      tile.pairs.begin += blockIdx.x % 2 * kHalf;
      tile.pairs.end = min(tile.pairs.end, tile.pairs.begin + kHalf);
      if (tile.pairs.count() > 0) return true;
    }
    return false;
  }

 private:
  static constexpr int kUndecided = -1, kHalf = kMaxRows / 2;
};

}  // namespace dsmoe::cuda::sm90a

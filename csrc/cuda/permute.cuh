// What permute leaves in its workspace, for kernels that need the pairs of a chunk of tokens.
#pragma once

#include "kernels.h"

namespace dsmoe::cuda {

constexpr int kTokensPerChunk = 256;

struct PermuteTables {
  int64_t num_chunks;
  int32_t*
      counts;  // [E+1, num_chunks]  pairs of an expert before a chunk; row E: pairs before a chunk
  int32_t* totals;  // [E+1]              pairs of an expert, then A
};

PermuteTables permute_tables(const PermuteParams& params, void* workspace);

// Everything a kernel reads of the active pairs.
struct PairLists {
  PermuteTables tables;
  const int32_t* pair_offsets;  // [E+1]
  const int32_t* token_idx;     // [A]
};

}  // namespace dsmoe::cuda

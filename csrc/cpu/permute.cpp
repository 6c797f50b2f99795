// permute: gates [T,E] -> the active pairs, expert-major and token-major (see PermuteParams).
//
// A counting sort with a fixed number of chunks of tokens: every chunk counts its pairs per expert,
// an exclusive sum over (expert, chunk) gives each chunk its first position in every expert's list,
// and the chunks fill in. Stable, the same result for any number of threads, two reads of gates.
#include <vector>

#include "cpu/parallel.h"
#include "kernels.h"

namespace dsmoe::cpu {
namespace {

template <class T>
int64_t permute_pairs(const PermuteParams& p, const Team& team) {
  const int32_t num_experts = p.num_experts;
  const T* gates = static_cast<const T*>(p.gates);
  const int chunks = chunk_count(team, p.num_tokens * num_experts);
  std::vector<int32_t> next(static_cast<size_t>(chunks) * num_experts);  // [chunks,E]

  for_each_chunk(team, chunks, p.num_tokens, [&](int chunk, int64_t begin, int64_t end) {
    std::vector<int32_t> count(num_experts);
    for (int64_t t = begin; t < end; ++t) {
      int32_t active = 0;
      for (int32_t e = 0; e < num_experts; ++e) {
        const bool is_active = gates[t * num_experts + e] != T(0);
        count[e] += is_active;
        active += is_active;
      }
      p.token_offsets[t + 1] = active;
    }
    std::copy(count.begin(), count.end(), next.begin() + static_cast<size_t>(chunk) * num_experts);
  });

  int64_t num_active = 0;
  for (int32_t e = 0; e < num_experts; ++e) {
    p.pair_offsets[e] = static_cast<int32_t>(num_active);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      int32_t& position = next[static_cast<size_t>(chunk) * num_experts + e];
      const int32_t count = position;
      position = static_cast<int32_t>(num_active);
      num_active += count;
    }
  }
  p.pair_offsets[num_experts] = static_cast<int32_t>(num_active);
  p.token_offsets[0] = 0;
  for (int64_t t = 0; t < p.num_tokens; ++t) p.token_offsets[t + 1] += p.token_offsets[t];
  if (num_active > p.capacity) return num_active;

  for_each_chunk(team, chunks, p.num_tokens, [&](int chunk, int64_t begin, int64_t end) {
    int32_t* position = next.data() + static_cast<size_t>(chunk) * num_experts;
    for (int64_t t = begin; t < end; ++t) {
      int32_t slot = p.token_offsets[t];
      for (int32_t e = 0; e < num_experts; ++e) {
        if (gates[t * num_experts + e] == T(0)) continue;
        p.slot_idx[slot++] = position[e];
        p.token_idx[position[e]++] = static_cast<int32_t>(t);
      }
    }
  });
  return num_active;
}

}  // namespace

int64_t permute(const PermuteParams& params, const Team& team) {
  return params.gates_dtype == Dtype::kFloat64 ? permute_pairs<double>(params, team)
                                               : permute_pairs<float>(params, team);
}

}  // namespace dsmoe::cpu

// A pass over a part of the tokens: what its kernels share, and the workspace it lives in.
#pragma once

#include <algorithm>

#include "cuda/activation.cuh"
#include "cuda/gemm_tile.cuh"
#include "cuda/scheduler.cuh"
#include "cuda/weight_rows.cuh"

namespace dsmoe::cuda {

constexpr int kThreads = 128;
constexpr int kTileM = 128;
constexpr int kCopyRows = kThreads / kChunksPerRow;  // rows of a step that a CTA copies at once
constexpr int kCtasPerSm = 2;
constexpr int kExpertThreads = 512;  // of a CTA that goes through all experts
constexpr int kMostParts = 192;      // units of `down` times parts of each, where these are several

// Which of the launches that together make one sum this is: the first does not read what was there, the
// last writes the result.
struct Turn {
  bool is_first = true, is_last = true;
};

// What `down` sums over neurons: a row of the workspace times rows of a weight matrix.
template <class T>
struct SumSource {
  const T* rows;                // [Tp,width]
  WeightRows<const T> weights;  // [I,H]
};

// Pointers are to the pass's first token.
template <class T>
struct PassArgs {
  int64_t num_tokens;
  int64_t hidden_size;
  int32_t num_experts;
  int32_t group_size;  // Settings', of the schedulers
  int64_t x_stride;
  const T* x;                     // [Tp,H]
  const float* gates;             // [Tp,E]
  WeightRows<const T> gate_proj;  // [I,H]
  WeightRows<const T> up_proj;    // [I,H]
  Logistic logistic;              // the activation
  ExactActivation exact;          // the same for exact fp32
  const int32_t* expert_offsets;  // [E+1]
  PairLists lists;
  int64_t width;            // row length of the workspace's matrices: room for aligned experts
  int32_t* expert_columns;  // [E+1]  first column of an expert, a multiple of kColumnAlign
  int32_t* row_of_column;   // [width]   row of the sources' weights, -1 in the gaps
  T* activations;           // [Tp,width]   the forward's result of gate_up
  int64_t intermediate_size;
  T* saved;  // [Tp,2,I]   g and u for the backward, or null: saved_activations.cuh
  int num_sources;
  SumSource<T> sources[2];
  Turn turn;  // of `down`, among passes over neurons
  // [CTAs, 256, 128]; a strip per unit of work if there are several turns or parts; not for fp32, summed in y
  float* strips;
  // Of `down`: CTAs that share a sum, whose last to arrive adds their strips up in order; and how many have
  int32_t parts = 1;
  unsigned* arrived;  // [units / parts], where there are several
  T* y;               // [Tp,H]   what `down` writes
};

// Where experts' columns begin (an exclusive sum of sizes rounded up), and which row of the sources' weights stands
// behind a column. Every CTA sums by itself, 512 experts at a time; then a thread writes four columns, whose
// expert it finds by halving.
template <class T>
__global__ void __launch_bounds__(kExpertThreads)
    place_columns_kernel(const __grid_constant__ PassArgs<T> args) {
  __shared__ int warp_totals[kExpertThreads / kWarp];
  __shared__ int first_columns[kMaxExperts + 1];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int before = 0;  // columns of earlier rounds
  for (int base = 0; base < args.num_experts; base += kExpertThreads) {
    const int expert = base + threadIdx.x;
    const bool exists = expert < args.num_experts;
    const int first = exists ? args.expert_offsets[expert] : 0;
    const int size = exists ? args.expert_offsets[expert + 1] - first : 0;
    const int padded = ceil_div(size, kColumnAlign) * kColumnAlign;
    const int through = warp_inclusive_sum(padded);
    if (lane == kWarp - 1) warp_totals[warp] = through;
    __syncthreads();
    int end = before + through;
    for (int w = 0; w < kExpertThreads / kWarp; ++w) {
      if (w < warp) end += warp_totals[w];
      before += warp_totals[w];
    }
    if (exists) first_columns[expert] = end - padded;
    if (expert == args.num_experts - 1) first_columns[args.num_experts] = end;
    __syncthreads();  // warp_totals are free again
  }
  const int index = blockIdx.x * kExpertThreads + threadIdx.x;
  if (index <= args.num_experts) args.expert_columns[index] = first_columns[index];
  if (args.parts > 1 && index < kMostParts) args.arrived[index] = 0;
  const int column = index * 4;
  if (column >= first_columns[args.num_experts]) return;
  int expert = 0;  // the last one that begins here or before
  for (int beyond = args.num_experts; beyond - expert > 1;) {
    const int middle = (expert + beyond) / 2;
    (first_columns[middle] <= column ? expert : beyond) = middle;
  }
  const int neuron = args.expert_offsets[expert] + column - first_columns[expert];
  const int left = args.expert_offsets[expert + 1] - neuron;
  const int row = static_cast<int>(args.sources[0].weights.row(expert, neuron));
  const int4 rows{left > 0 ? row : -1, left > 1 ? row + 1 : -1, left > 2 ? row + 2 : -1,
                  left > 3 ? row + 3 : -1};
  *reinterpret_cast<int4*>(args.row_of_column + column) = rows;
}

// Zeros in a matrix [Tp,width] at inactive pairs of small experts, which `down` reads. A thread per 16
// bytes.
template <class T>
__global__ void clear_inactive_kernel(const __grid_constant__ PassArgs<T> args, T* matrix) {
  const int expert = blockIdx.y;
  const int size = args.expert_offsets[expert + 1] - args.expert_offsets[expert];
  if (size == 0 || size >= SpanIterator::kSmall) return;
  const int chunks = ceil_div(size, kNumbers<T>);
  T* rows = matrix + args.expert_columns[expert];
  const int64_t count = args.num_tokens * chunks;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += gridDim.x * int64_t{blockDim.x}) {
    const int64_t token = i / chunks;
    if (args.gates[token * args.num_experts + expert] != 0.f) continue;
    const int64_t column = (i - token * chunks) * kNumbers<T>;
    __stcg(reinterpret_cast<uint4*>(rows + token * args.width + column), uint4{});
  }
}

// ---------------------------------------------------------------------------------------- the host

// For at most so many columns.
template <class T>
void place_columns(const PassArgs<T>& args, int64_t columns, cudaStream_t on) {
  const int64_t threads = std::max<int64_t>(args.num_experts + 1, ceil_div<int64_t>(columns, 4));
  const auto ctas = static_cast<unsigned>(ceil_div<int64_t>(threads, kExpertThreads));
  place_columns_kernel<<<ctas, kExpertThreads, 0, on>>>(args);
}

// Hands out places in the workspace, one after the other.
struct Carver {
  int64_t bytes = 0;
  int64_t place(int64_t size) {
    const int64_t at = bytes;
    bytes += ceil_div<int64_t>(size, 256) * 256;
    return at;
  }
};

// Columns that the experts take at most: every one of them is rounded up.
inline int64_t matrix_width(const ExpertMlpParams& p) {
  const int64_t not_empty = std::min<int64_t>(p.num_experts, p.intermediate_size);
  const int64_t most = p.intermediate_size + not_empty * (kColumnAlign - 1);
  return most / kColumnAlign * kColumnAlign;
}

// How many of `count` a pass takes, a multiple of `unit`: at most `most` (but one unit), and all passes
// alike.
template <class Int>
__host__ __device__ Int per_pass(Int count, Int unit, Int most) {
  const Int units = ceil_div(count, unit), room = most < unit ? 1 : most / unit;
  const Int passes = ceil_div(units, room);
  return passes > 0 ? ceil_div(units, passes) * unit : 0;
}

// The lists of a pass's pairs in the workspace.
struct ListsLayout {
  int64_t tables, pair_offsets, token_idx;
};

inline PermuteParams pass_permute(const ExpertMlpParams& p, int64_t tokens) {
  PermuteParams q{};
  q.gates_dtype = Dtype::kFloat32;
  q.num_tokens = tokens;
  q.num_experts = p.num_experts;
  q.capacity = tokens * p.num_experts;
  return q;
}

inline ListsLayout place_lists(Carver& carver, const ExpertMlpParams& p, int64_t tokens) {
  ListsLayout l{};
  l.tables = carver.place(permute_workspace_bytes(pass_permute(p, tokens)));
  l.pair_offsets = carver.place((p.num_experts + 1) * 4);
  l.token_idx = carver.place(tokens * p.num_experts * 4);
  return l;
}

// Launches permute over a pass's gates; token_offsets and slot_idx are not wanted.
inline Status make_lists(const ExpertMlpParams& p, int64_t tokens, const float* gates,
                         const ListsLayout& l, unsigned char* workspace, cudaStream_t on,
                         PairLists& lists) {
  PermuteParams q = pass_permute(p, tokens);
  q.gates = gates;
  q.pair_offsets = reinterpret_cast<int32_t*>(workspace + l.pair_offsets);
  q.token_idx = reinterpret_cast<int32_t*>(workspace + l.token_idx);
  lists = {permute_tables(q, workspace + l.tables), q.pair_offsets, q.token_idx};
  return permute(q, workspace + l.tables, on);
}

}  // namespace dsmoe::cuda

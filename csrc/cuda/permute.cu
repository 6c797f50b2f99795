// permute: gates [T,E] -> expert-major and token-major lists of the A active pairs
//
//   pair_offsets[e]   number of active pairs of experts before e          token_idx[p]  token of pair p
//   token_offsets[t]  number of active pairs of tokens before t           slot_idx[j]   pair of slot j
//
// A pair's place is a sum of counts, so nothing is sorted and nothing depends on timing. Tokens are cut
// into chunks of 256, one per CTA, and a warp takes 32 tokens. Its lanes are experts while it reads
// gates (a row of gates is contiguous), and collect one 32-bit mask of tokens each; then its lanes are
// tokens, and a mask's bits below the lane are the pair's rank in the warp. Three launches:
//
//   count   pairs per (expert, chunk), and per chunk                      reads gates once
//   scan    exclusive sums over the chunks, a warp per expert             A stays on the device
//   write   masks again, places, lists                                    reads gates once more
//
// A single pass with look-back would save one read of gates, 4 T E bytes: less than a hundredth of the
// expert_mlp that follows, for spinning between CTAs. Three launches are simpler and as good in a graph.
#include "cuda/launch.cuh"
#include "cuda/permute.cuh"

namespace dsmoe::cuda {
namespace {

constexpr int kWarps = 8;  // 256 threads: 8 CTAs fill an SM's 2048 threads
static_assert(kTokensPerChunk == kWarps * kWarp, "one token per lane");

// Shared memory is dynamic, so that few experts don't keep CTAs off an SM for the sake of many.
// A kernel need not ask for 48 KiB, its warps' totals among them.
constexpr int kUnasked = (48 << 10) - kWarps * int{sizeof(int32_t)};
constexpr int count_shared_bytes(int num_experts) {
  return num_experts * kWarps * int{sizeof(uint16_t)};
}
static_assert(count_shared_bytes(kMaxExperts) <= kUnasked);

int64_t count_chunks(const PermuteParams& p) {
  const int64_t chunks = ceil_div<int64_t>(p.num_tokens, kTokensPerChunk);
  return chunks > 0 ? chunks : 1;  // without tokens the offsets are still written
}

// Bit i of the result: is expert `expert` active for token first_token + i? One expert per lane.
__device__ __forceinline__ uint32_t token_mask(const PermuteParams& p, int64_t first_token,
                                               int expert) {
  const float* gate = static_cast<const float*>(p.gates) + first_token * p.num_experts + expert;
  const int64_t left = p.num_tokens - first_token;
  const int rows = expert < p.num_experts ? static_cast<int>(left < kWarp ? left : kWarp) : 0;
  uint32_t mask = 0;
#pragma unroll 8  // eight loads in flight hide most of the latency
  for (int i = 0; i < rows; ++i) {
    mask |= uint32_t{gate[static_cast<int64_t>(i) * p.num_experts] != 0.f} << i;
  }
  return mask;
}

__global__ void __launch_bounds__(kTokensPerChunk)
    count_kernel(const __grid_constant__ PermuteParams p,
                 const __grid_constant__ PermuteTables tables) {
  extern __shared__ uint16_t counts[];  // [kWarps,E]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first_token = blockIdx.x * int64_t{kTokensPerChunk} + warp * kWarp;
  for (int expert = lane; expert < p.num_experts + lane; expert += kWarp) {
    const int count = __popc(token_mask(p, first_token, expert));
    if (expert < p.num_experts) counts[warp * p.num_experts + expert] = count;
  }
  __syncthreads();
  __shared__ int32_t warp_totals[kWarps];
  int total = 0;  // of this thread's experts
  for (int expert = threadIdx.x; expert < p.num_experts; expert += kTokensPerChunk) {
    int count = 0;
    for (int w = 0; w < kWarps; ++w) count += counts[w * p.num_experts + expert];
    tables.counts[expert * tables.num_chunks + blockIdx.x] = count;
    total += count;
  }
  total = warp_sum(total);
  if (lane == 0) warp_totals[warp] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) total += warp_totals[w];
    tables.counts[p.num_experts * tables.num_chunks + blockIdx.x] = total;
  }
}

// A warp per row of counts: exclusive sums along the row, in place.
__global__ void __launch_bounds__(kTokensPerChunk)
    scan_kernel(const __grid_constant__ PermuteTables tables, int num_rows) {
  const int row = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (row >= num_rows) return;  // whole warps leave
  int32_t* counts = tables.counts + row * tables.num_chunks;
  int before = 0;
  for (int64_t first = 0; first < tables.num_chunks; first += kWarp) {
    const int64_t chunk = first + lane;
    const int count = chunk < tables.num_chunks ? counts[chunk] : 0;
    const int through = warp_inclusive_sum(count);
    if (chunk < tables.num_chunks) counts[chunk] = before + through - count;
    before += __shfl_sync(kAllLanes, through, kWarp - 1);
  }
  if (lane == 0) tables.totals[row] = before;
}

// A warp's first pair of an expert is the chunk's first one plus what earlier warps have of it. That is
// at most 7 * 32, a byte: 44 bytes an expert, so that 2048 fit into the 99 KiB that every GPU has.
struct WriteShared {
  uint8_t (*before)[kWarps];  // [E,kWarps]  pairs of an expert that the chunk's earlier warps have
  uint32_t* masks;            // [kWarps,E]  the warp's tokens that are active for an expert
  int32_t* first_pairs;       // [E+1]       the chunk's first pair of an expert, then A

  __device__ WriteShared(unsigned char* shared, int num_experts)
      : before(reinterpret_cast<uint8_t (*)[kWarps]>(shared)),
        masks(reinterpret_cast<uint32_t*>(before + num_experts)),
        first_pairs(reinterpret_cast<int32_t*>(masks + kWarps * num_experts)) {}
  static constexpr int bytes(int num_experts) {
    return num_experts * (kWarps + 4 * kWarps + 4) + 4;
  }
};
static_assert(WriteShared::bytes(kMaxExperts) + 4 * kWarps <= 99 << 10, "with warp_totals");
static_assert(kWarps == sizeof(uint64_t) && (kWarps - 1) * kWarp < 256, "written at once");

// One warp: offsets[e] = sum of totals before e, and A behind the last.
__device__ void scan_totals(const int32_t* totals, int num_experts, int32_t* offsets) {
  const int lane = threadIdx.x % kWarp;
  int before = 0;
  for (int first = 0; first < num_experts; first += kWarp) {
    const int count = first + lane < num_experts ? totals[first + lane] : 0;
    const int through = warp_inclusive_sum(count);
    if (first + lane < num_experts) offsets[first + lane] = before + through - count;
    before += __shfl_sync(kAllLanes, through, kWarp - 1);
  }
  if (lane == 0) offsets[num_experts] = before;
}

__global__ void __launch_bounds__(kTokensPerChunk)
    write_kernel(const __grid_constant__ PermuteParams p,
                 const __grid_constant__ PermuteTables tables) {
  extern __shared__ __align__(8) unsigned char shared[];
  __shared__ int32_t warp_totals[kWarps];
  const WriteShared s(shared, p.num_experts);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t token = blockIdx.x * int64_t{kTokensPerChunk} + threadIdx.x;
  uint32_t* masks = s.masks + warp * p.num_experts;
  for (int expert = lane; expert < p.num_experts + lane; expert += kWarp) {
    const uint32_t mask = token_mask(p, token - lane, expert);
    if (expert < p.num_experts) masks[expert] = mask;
  }
  if (warp == 0) scan_totals(tables.totals, p.num_experts, s.first_pairs);
  __syncthreads();

  for (int expert = threadIdx.x; expert < p.num_experts; expert += kTokensPerChunk) {
    s.first_pairs[expert] += tables.counts[expert * tables.num_chunks + blockIdx.x];
    uint64_t before = 0;
    for (int w = 0; w < kWarps - 1; ++w) {  // a warp's count goes to the bytes of all later ones
      const uint64_t count = __popc(s.masks[w * p.num_experts + expert]);
      before += count * (0x0101010101010100 << 8 * w);
    }
    *reinterpret_cast<uint64_t*>(s.before[expert]) = before;
  }
  int num_active = 0;  // of this lane's token
  for (int expert = 0; expert < p.num_experts; ++expert) {
    num_active += masks[expert] >> lane & 1u;
  }
  const int through = warp_inclusive_sum(num_active);
  if (lane == kWarp - 1) warp_totals[warp] = through;
  __syncthreads();

  int slot = tables.counts[p.num_experts * tables.num_chunks + blockIdx.x] + through - num_active;
  for (int w = 0; w < warp; ++w) slot += warp_totals[w];
  if (token < p.num_tokens && p.token_offsets != nullptr) p.token_offsets[token] = slot;
  if (blockIdx.x == 0) {  // the first chunk's first pairs are the experts'
    if (threadIdx.x == 0 && p.token_offsets != nullptr) {
      p.token_offsets[p.num_tokens] = tables.totals[p.num_experts];
    }
    for (int e = threadIdx.x; e <= p.num_experts; e += kTokensPerChunk) {
      p.pair_offsets[e] = s.first_pairs[e];
    }
  }
  const uint32_t lower_lanes = (1u << lane) - 1;
  for (int expert = 0; expert < p.num_experts; ++expert) {
    const uint32_t mask = masks[expert];
    if ((mask >> lane & 1u) == 0) continue;
    const int pair = s.first_pairs[expert] + s.before[expert][warp] + __popc(mask & lower_lanes);
    if (pair < p.capacity) p.token_idx[pair] = static_cast<int32_t>(token);
    if (slot < p.capacity && p.slot_idx != nullptr) p.slot_idx[slot] = pair;
    ++slot;
  }
}

}  // namespace

PermuteTables permute_tables(const PermuteParams& p, void* workspace) {
  PermuteTables tables{count_chunks(p), static_cast<int32_t*>(workspace), nullptr};
  tables.totals = tables.counts + (p.num_experts + 1) * tables.num_chunks;
  return tables;
}

int64_t permute_workspace_bytes(const PermuteParams& p) {
  return (p.num_experts + 1) * (count_chunks(p) + 1) * int64_t{sizeof(int32_t)};
}

Status permute(const PermuteParams& p, void* workspace, Stream stream) {
  if (p.gates_dtype != Dtype::kFloat32 || p.num_experts > kMaxExperts) return Status::kUnsupported;
  const PermuteTables tables = permute_tables(p, workspace);
  const auto on = static_cast<cudaStream_t>(stream);
  const unsigned chunks = static_cast<unsigned>(tables.num_chunks);
  count_kernel<<<chunks, kTokensPerChunk, count_shared_bytes(p.num_experts), on>>>(p, tables);
  scan_kernel<<<ceil_div(p.num_experts + 1, kWarps), kTokensPerChunk, 0, on>>>(tables,
                                                                               p.num_experts + 1);
  const int write_bytes = WriteShared::bytes(p.num_experts);
  if (write_bytes > kUnasked) {  // always for the most, since other threads may be launching it
    cudaFuncSetAttribute(write_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         WriteShared::bytes(kMaxExperts));
  }
  write_kernel<<<chunks, kTokensPerChunk, write_bytes, on>>>(p, tables);
  return launch_status();
}

}  // namespace dsmoe::cuda

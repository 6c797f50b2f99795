// router: logits [T,R] = x [T,H] W^T [H,R] + b, in exact fp32 multiply-adds whatever x is
//
// A warp makes 8 tokens x 8 experts: its lanes walk along H, four terms each, and every lane keeps 64
// sums, so that the 16 vectors which a step loads are worth 256 multiply-adds a lane. Nothing goes
// through shared memory on its way in: rows are read along H as they lie, and warps that need the same
// rows find them in L1. In the end the lanes' sums are added in a fixed order.
//
//   few tiles    eight warps share one and cut H: a token's logits are made by as many warps as there
//                is work for, and reading W once is all that decoding costs
//   many         a warp each; eight neighbours take 32 tokens x 16 experts, or 64 x 8 if that is all,
//                which asks L2 for 32 bytes a cycle at the full rate of an H100's multiply-adds (bf16)
//
// A token's bits don't depend on its neighbours, nor on the chip; on T only in which of the two it is.
#include "cuda/router.cuh"

namespace dsmoe::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kTile = 8;                   // tokens and experts of a warp
constexpr int kStepTerms = kWarp * kQuad;  // of H
constexpr int kBand = 4;                   // tiles along T that neighbouring warps take first

// Adds the lanes' sums: lane l gets the whole sums 2l and 2l + 1. In every round half of what is left
// goes to the lane that differs in one bit, and its other half comes back.
__device__ __forceinline__ float2 sum_over_lanes(float (&sums)[kTile * kTile]) {
  static_assert(kTile * kTile == 2 * kWarp);
#pragma unroll
  for (int round = 0; round < 5; ++round) {
    const int half = kWarp >> round;  // of the sums that are left
    const bool keeps_high = threadIdx.x & half / 2;
#pragma unroll
    for (int i = 0; i < kWarp; ++i) {
      if (i >= half) continue;
      const float given = keeps_high ? sums[i] : sums[half + i];
      const float kept = keeps_high ? sums[half + i] : sums[i];
      sums[i] = kept + __shfl_xor_sync(kAllLanes, given, half / 2);
    }
  }
  return {sums[0], sums[1]};
}

// The tile of this warp; its tokens may not exist.
struct Tile {
  int64_t token;
  int expert;

  __device__ Tile(const RouterParams& p, bool is_shared) {
    const int columns = static_cast<int>(ceil_div<int64_t>(p.num_routed, kTile));
    const int index = is_shared ? blockIdx.x : blockIdx.x * kWarps + threadIdx.x / kWarp;
    const int height = is_shared ? 1 : kBand, band = index / (height * columns);
    const int within = index % (height * columns);
    token = (int64_t{band} * height + within % height) * kTile;
    expert = within / height * kTile;
  }
};

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    router_kernel(const __grid_constant__ RouterParams p, bool is_shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const Tile tile(p, is_shared);
  const T* x = static_cast<const T*>(p.x) + tile.token * p.x_stride;
  const float* weight = static_cast<const float*>(p.weight) + tile.expert * p.hidden_size;
  const int tokens = static_cast<int>(min(p.num_tokens - tile.token, int64_t{kTile}));
  const int experts = static_cast<int>(min(p.num_routed - tile.expert, int64_t{kTile}));
  // the pointers walk from row to row: addresses of all 16 would take registers that are not there
  float sums[kTile * kTile] = {};
  const int first = (is_shared ? warp * kStepTerms : 0) + lane * kQuad;
  const int step = is_shared ? kWarps * kStepTerms : kStepTerms;
  x += first;
  weight += first;
  for (int h = first; h < p.hidden_size; h += step) {
    float4 w[kTile];
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      w[j] = j < experts ? load_quad(weight) : float4{};
      weight += p.hidden_size;
    }
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const float4 row = i < tokens ? load_quad(x) : float4{};
      x += p.x_stride;
#pragma unroll
      for (int j = 0; j < kTile; ++j) {
        float& sum = sums[i * kTile + j];
        sum = fmaf(row.x, w[j].x, sum);
        sum = fmaf(row.y, w[j].y, sum);
        sum = fmaf(row.z, w[j].z, sum);
        sum = fmaf(row.w, w[j].w, sum);
      }
    }
    x += step - kTile * p.x_stride;
    weight += step - kTile * p.hidden_size;
  }

  float2 total = sum_over_lanes(sums);
  if (is_shared) {
    __shared__ float2 parts[kWarps][kWarp];
    parts[warp][lane] = total;
    __syncthreads();
    if (warp > 0) return;
    for (int other = 1; other < kWarps; ++other) {
      total.x += parts[other][lane].x;
      total.y += parts[other][lane].y;
    }
  }
  const int64_t token = tile.token + lane / 4, expert = tile.expert + lane % 4 * 2;
  if (token >= p.num_tokens) return;
  const float* bias = static_cast<const float*>(p.bias);
  float* logits = static_cast<float*>(p.logits) + token * p.num_routed;
  if (expert < p.num_routed) logits[expert] = total.x + (bias ? bias[expert] : 0.f);
  if (expert + 1 < p.num_routed) logits[expert + 1] = total.y + (bias ? bias[expert + 1] : 0.f);
}

}  // namespace

Status router(const RouterParams& p, Stream stream) {
  if (p.hidden_size % 8 != 0) return Status::kUnsupported;
  if (p.num_tokens == 0 || p.num_routed == 0) return Status::kOk;
  return dispatch_router_dtype(p.dtype, [&](auto x) {
    const int64_t rows = ceil_div<int64_t>(p.num_tokens, kTile);
    const int64_t columns = ceil_div<int64_t>(p.num_routed, kTile);
    const bool is_shared = rows * columns < settings().router_tiles;
    const int64_t ctas =
        is_shared ? rows * columns
                  : ceil_div(ceil_div<int64_t>(rows, kBand) * kBand * columns, int64_t{kWarps});
    router_kernel<decltype(x)>
        <<<static_cast<unsigned>(ctas), kWarps * kWarp, 0, static_cast<cudaStream_t>(stream)>>>(
            p, is_shared);
  });
}

}  // namespace dsmoe::cuda

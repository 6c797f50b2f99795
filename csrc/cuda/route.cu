// route: router logits z [T,R] -> scores s [T,R] and gates G [T,E], by the rules of common/routing.h
//
//   threshold  s = sigmoid(z)   active iff s > tau                                    DSMoE
//   top_p      s = softmax(z)   active while the mass ranked before is < tau          XMoE
//   top_k      s = softmax(z)   the k largest; value = softmax over these alone       MoDSE
//   relu       s = relu(z)      active iff s > 0                                      ReMoE
//
//   G = factor_t * (binary ? 1 : value) where active, else 0
//   factor_t = gate_scale * I_routed / sum of the active sizes                        (rescale)
//
// backward: the factor is a constant and the threshold is passed straight through, so
// d value = factor * dG for every pair, then the derivatives of value and of s by z.
//
// A warp per token: rows are a few KiB, so a row is read again from L1 instead of being kept in
// registers, and no size needs a kernel of its own. A rank is the number of logits that come before:
// R^2 / 32 comparisons per lane, cheaper than a sort of up to 512 numbers. Calibrated models have more
// experts, but a threshold, which needs no ranks. Every lane writes only its own experts; top_p alone
// reads what other lanes wrote, after __syncwarp.
#include <cmath>

#include "common/routing.h"
#include "cuda/launch.cuh"

namespace dsmoe::cuda {
namespace {

constexpr int kWarps = 8;

struct Row {
  int num_routed;
  const float* logits;  // [R]
  float* scores;        // [R]
  float* values;        // [R]   the routed part of gates
};

// f(e) for the experts of this lane.
template <class F>
__device__ __forceinline__ void for_my_experts(int num_routed, F f) {
  for (int e = threadIdx.x % kWarp; e < num_routed; e += kWarp) f(e);
}

__device__ float max_logit(const Row& row) {
  float best = row.logits[0];
  for_my_experts(row.num_routed, [&](int e) {
    if (ranks_before(row.logits[e], best)) best = row.logits[e];
  });
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, best, step);
    if (ranks_before(other, best)) best = other;
  }
  return best;
}

__device__ void softmax(const Row& row) {
  const float best = max_logit(row);
  float sum = 0.f;
  for_my_experts(row.num_routed, [&](int e) {
    row.scores[e] = expf(row.logits[e] - best);
    sum += row.scores[e];
  });
  sum = warp_sum(sum);
  for_my_experts(row.num_routed, [&](int e) { row.scores[e] /= sum; });
  __syncwarp();  // from here on every lane may read every score
}

// f(j) for every expert j that ranks before e; ties go to the lower index.
template <class F>
__device__ __forceinline__ void for_each_before(const Row& row, int e, F f) {
  const float own = row.logits[e];
  for (int j = 0; j < row.num_routed; ++j) {
    const float other = row.logits[j];
    if (ranks_before(other, own) || (j < e && !ranks_before(own, other))) f(j);
  }
}

__device__ void route_threshold(const Row& row, float threshold) {
  for_my_experts(row.num_routed, [&](int e) {
    const float score = sigmoid(row.logits[e]);
    row.scores[e] = score;
    row.values[e] = above(score, threshold) ? score : 0.f;
  });
}

__device__ void route_relu(const Row& row) {
  for_my_experts(row.num_routed, [&](int e) {
    const float logit = row.logits[e];
    row.scores[e] = row.values[e] = above(logit, 0.f) ? logit : 0.f;
  });
}

__device__ void route_top_p(const Row& row, float threshold) {
  softmax(row);
  for_my_experts(row.num_routed, [&](int e) {
    float mass_before = 0.f;
    bool is_first = true;
    for_each_before(row, e, [&](int j) {
      mass_before += row.scores[j];
      is_first = false;
    });
    // a threshold of 1 means every expert, rounding or not
    const bool keep = is_first || !(mass_before >= threshold && threshold < 1.f);
    row.values[e] = keep ? row.scores[e] : 0.f;
  });
}

__device__ void route_top_k(const Row& row, int top_k) {
  softmax(row);
  float mass = 0.f;
  for_my_experts(row.num_routed, [&](int e) {
    int rank = 0;
    for_each_before(row, e, [&](int) { ++rank; });
    row.values[e] = rank < top_k ? row.scores[e] : 0.f;
    mass += row.values[e];
  });
  mass = warp_sum(mass);
  for_my_experts(row.num_routed, [&](int e) {
    if (row.values[e] != 0.f) row.values[e] /= mass;
  });
}

// gate_scale, or gate_scale * I_routed / (sum of active sizes)
__device__ float token_factor(const RouteParams& p, const float* values) {
  const float scale = static_cast<float>(p.gate_scale);
  if (!p.rescale) return scale;
  const int32_t* offsets = p.expert_offsets + p.num_shared;
  const int num_routed = p.num_experts - p.num_shared;
  int active = 0;
  for_my_experts(num_routed, [&](int e) {
    if (values[e] != 0.f) active += offsets[e + 1] - offsets[e];
  });
  const float routed = static_cast<float>(offsets[num_routed] - offsets[0]);
  return scale * rescale_factor(routed, static_cast<float>(warp_sum(active)));
}

template <RouteMethod kMethod>
__global__ void __launch_bounds__(kWarps* kWarp)
    route_kernel(const __grid_constant__ RouteParams p) {
  const int64_t token = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  if (token >= p.num_tokens) return;  // whole warps leave
  const int num_routed = p.num_experts - p.num_shared;
  float* gates = static_cast<float*>(p.gates) + token * p.num_experts;
  const Row row{num_routed, static_cast<const float*>(p.logits) + token * num_routed,
                static_cast<float*>(p.scores) + token * num_routed, gates + p.num_shared};
  if constexpr (kMethod == RouteMethod::kThreshold) route_threshold(row, *p.threshold);
  if constexpr (kMethod == RouteMethod::kTopP) route_top_p(row, *p.threshold);
  if constexpr (kMethod == RouteMethod::kTopK) route_top_k(row, p.top_k);
  if constexpr (kMethod == RouteMethod::kRelu) route_relu(row);

  for (int e = threadIdx.x % kWarp; e < p.num_shared; e += kWarp) gates[e] = 1.f;
  const float factor = token_factor(p, row.values);
  for_my_experts(num_routed, [&](int e) {
    const float value = row.values[e];
    const bool is_nan = value != value;
    if (value != 0.f) row.values[e] = (p.binary && !is_nan ? 1.f : value) * factor;
  });
}

// What a softmax with result s(e) and gradient g(e) gives to the logits: s * (g - <g, s>)
template <class S, class G, class F>
__device__ __forceinline__ void softmax_backward(int num_routed, S s, G g, F give) {
  float dot = 0.f;
  for_my_experts(num_routed, [&](int e) { dot += g(e) * s(e); });
  dot = warp_sum(dot);
  for_my_experts(num_routed, [&](int e) { give(e, s(e) * (g(e) - dot)); });
}

template <RouteMethod kMethod>
__global__ void __launch_bounds__(kWarps* kWarp)
    route_backward_kernel(const __grid_constant__ RouteBackwardParams p) {
  const RouteParams& f = p.forward;
  const int64_t token = blockIdx.x * int64_t{kWarps} + threadIdx.x / kWarp;
  if (token >= f.num_tokens) return;
  const int num_routed = f.num_experts - f.num_shared;
  const int64_t routed = token * f.num_experts + f.num_shared;
  const float* gates = static_cast<const float*>(f.gates) + routed;
  const float* dgates = static_cast<const float*>(p.dgates) + routed;
  const float* scores = static_cast<const float*>(f.scores) + token * num_routed;
  const float* dscores =
      p.dscores ? static_cast<const float*>(p.dscores) + token * num_routed : nullptr;
  float* dlogits = static_cast<float*>(p.dlogits) + token * num_routed;
  const float factor = token_factor(f, gates);
  auto dscore = [&](int e) { return dscores ? dscores[e] : 0.f; };

  if constexpr (kMethod == RouteMethod::kThreshold || kMethod == RouteMethod::kRelu) {
    for_my_experts(num_routed, [&](int e) {
      const float s = scores[e];
      const float slope = kMethod == RouteMethod::kThreshold ? s * (1.f - s) : float(above(s, 0.f));
      dlogits[e] = slope * (factor * dgates[e] + dscore(e));
    });
  } else {
    // top_k's values are a softmax over the kept logits alone; binary gates do not hold it, so it is
    // formed again from the scores
    float mass = 1.f;
    if constexpr (kMethod == RouteMethod::kTopK) {
      mass = 0.f;
      for_my_experts(num_routed, [&](int e) { mass += gates[e] != 0.f ? scores[e] : 0.f; });
      mass = warp_sum(mass);
    }
    auto value = [&](int e) {
      return kMethod == RouteMethod::kTopK && gates[e] == 0.f ? 0.f : scores[e] / mass;
    };
    softmax_backward(
        num_routed, value, [&](int e) { return dgates[e]; },
        [&](int e, float d) { dlogits[e] = factor * d; });
    if (dscores) {
      softmax_backward(
          num_routed, [&](int e) { return scores[e]; }, dscore,
          [&](int e, float d) { dlogits[e] += d; });
    }
  }
}

// Calls launch with the method as a compile-time constant.
template <class Launch>
Status dispatch_method(const RouteParams& p, Launch launch) {
  if (p.dtype != Dtype::kFloat32) return Status::kUnsupported;
  if (p.num_tokens == 0) return Status::kOk;
  switch (p.method) {
    case RouteMethod::kThreshold:
      launch(std::integral_constant<RouteMethod, RouteMethod::kThreshold>());
      break;
    case RouteMethod::kTopP:
      launch(std::integral_constant<RouteMethod, RouteMethod::kTopP>());
      break;
    case RouteMethod::kTopK:
      launch(std::integral_constant<RouteMethod, RouteMethod::kTopK>());
      break;
    case RouteMethod::kRelu:
      launch(std::integral_constant<RouteMethod, RouteMethod::kRelu>());
      break;
  }
  return launch_status();
}

}  // namespace

Status route(const RouteParams& p, Stream stream) {
  return dispatch_method(p, [&](auto method) {
    const auto ctas = static_cast<unsigned>(ceil_div<int64_t>(p.num_tokens, kWarps));
    route_kernel<decltype(method)::value>
        <<<ctas, kWarps * kWarp, 0, static_cast<cudaStream_t>(stream)>>>(p);
  });
}

Status route_backward(const RouteBackwardParams& p, Stream stream) {
  return dispatch_method(p.forward, [&](auto method) {
    const auto ctas = static_cast<unsigned>(ceil_div<int64_t>(p.forward.num_tokens, kWarps));
    route_backward_kernel<decltype(method)::value>
        <<<ctas, kWarps * kWarp, 0, static_cast<cudaStream_t>(stream)>>>(p);
  });
}

}  // namespace dsmoe::cuda

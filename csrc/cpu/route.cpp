// route: router logits z [T,R] -> scores s [T,R] and gates G [T,E]
//
//   threshold  s = sigmoid(z)   active iff s > tau                        DSMoE, arXiv 2502.12455
//   top_p      s = softmax(z)   active while the mass before it < tau     XMoE, arXiv 2403.18926
//   top_k      s = softmax(z)   the k largest; value: their softmax       MoDSE, arXiv 2409.12210
//   relu       s = relu(z)      active iff s > 0                          ReMoE, arXiv 2412.14711
//
//   G = factor_t * (binary ? 1 : value) where active, else 0
//   factor_t = gate_scale * I_routed / (sum of active sizes)
//
// backward: the factor is a constant and the threshold is passed straight through, so d value =
// factor * dG for every pair, then the derivative of value and s by z.
//
// Tokens are independent, and a token's row of R logits stays in the first-level cache: one pass
// per token.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "common/routing.h"
#include "cpu/parallel.h"
#include "cpu/team.h"
#include "kernels.h"

namespace dsmoe::cpu {
namespace {

template <class T>
struct Row {
  int32_t num_routed;
  const T* logits;  // [R]
  T* scores;        // [R]
  T* values;        // [R]   the routed part of gates: value where active, else 0
};

template <class T>
void softmax(const Row<T>& row) {
  T max = row.logits[0];
  for (int32_t e = 1; e < row.num_routed; ++e) {
    if (ranks_before(row.logits[e], max)) max = row.logits[e];
  }
  T sum = 0;
  for (int32_t e = 0; e < row.num_routed; ++e) {
    row.scores[e] = std::exp(row.logits[e] - max);
    sum += row.scores[e];
  }
  for (int32_t e = 0; e < row.num_routed; ++e) row.scores[e] /= sum;
}

template <class T>
void rank(const Row<T>& row, std::vector<int32_t>& order) {
  order.resize(row.num_routed);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return ranks_before(row.logits[a], row.logits[b]);
  });
}

template <class T>
void route_threshold(const Row<T>& row, T threshold) {
  if constexpr (sizeof(T) == sizeof(float))
    sigmoids(row.logits, row.scores, row.num_routed);
  else
    for (int32_t e = 0; e < row.num_routed; ++e) row.scores[e] = sigmoid(row.logits[e]);
  for (int32_t e = 0; e < row.num_routed; ++e) {
    row.values[e] = above(row.scores[e], threshold) ? row.scores[e] : T(0);
  }
}

template <class T>
void route_relu(const Row<T>& row) {
  for (int32_t e = 0; e < row.num_routed; ++e) {
    row.values[e] = row.scores[e] = above(row.logits[e], T(0)) ? row.logits[e] : T(0);
  }
}

template <class T>
void route_top_p(const Row<T>& row, T threshold, std::vector<int32_t>& order) {
  softmax(row);
  rank(row, order);
  T mass_before = 0;
  for (int32_t j = 0; j < row.num_routed; ++j) {
    if (j > 0 && mass_before >= threshold && threshold < T(1))
      break;  // 1 means every expert, rounding or not
    row.values[order[j]] = row.scores[order[j]];
    mass_before += row.scores[order[j]];
  }
}

template <class T>
void route_top_k(const Row<T>& row, int32_t top_k, std::vector<int32_t>& order) {
  softmax(row);
  rank(row, order);
  T mass = 0;
  for (int32_t j = 0; j < top_k; ++j) mass += row.scores[order[j]];
  for (int32_t j = 0; j < top_k; ++j) row.values[order[j]] = row.scores[order[j]] / mass;
}

// gate_scale, or gate_scale * I_routed / (sum of active sizes)
template <class T>
T token_factor(const RouteParams& p, const T* values) {
  if (!p.rescale) return static_cast<T>(p.gate_scale);
  const int32_t* offsets = p.expert_offsets + p.num_shared;
  const int32_t num_routed = p.num_experts - p.num_shared;
  int32_t active = 0;
  for (int32_t e = 0; e < num_routed; ++e)
    active += values[e] != T(0) ? offsets[e + 1] - offsets[e] : 0;
  const T routed = static_cast<T>(offsets[num_routed] - offsets[0]);
  return static_cast<T>(p.gate_scale) * rescale_factor(routed, static_cast<T>(active));
}

template <class T>
void route_rows(const RouteParams& p, int64_t begin, int64_t end) {
  const int32_t num_routed = p.num_experts - p.num_shared;
  const T threshold = static_cast<T>(*p.threshold);
  std::vector<int32_t> order;
  for (int64_t t = begin; t < end; ++t) {
    T* gates = static_cast<T*>(p.gates) + t * p.num_experts;
    const Row<T> row{num_routed, static_cast<const T*>(p.logits) + t * num_routed,
                     static_cast<T*>(p.scores) + t * num_routed, gates + p.num_shared};
    std::fill_n(gates, p.num_shared, T(1));
    std::fill_n(row.values, num_routed, T(0));
    switch (p.method) {
      case RouteMethod::kThreshold:
        route_threshold(row, threshold);
        break;
      case RouteMethod::kRelu:
        route_relu(row);
        break;
      case RouteMethod::kTopP:
        route_top_p(row, threshold, order);
        break;
      case RouteMethod::kTopK:
        route_top_k(row, p.top_k, order);
        break;
    }
    const T factor = token_factor(p, row.values);
    for (int32_t e = 0; e < num_routed;
         ++e) {  // without branches: which pairs are active is random
      const T value = row.values[e];
      const T scaled = (p.binary && value == value ? T(1) : value) * factor;
      row.values[e] = value != T(0) ? scaled : T(0);
    }
  }
}

// Adds to dlogits the gradient through a softmax with result s, whose own gradient is scale * g: s
// * (g - <g, s>)
template <class T>
void add_softmax_backward(int32_t n, const T* s, const T* g, T scale, T* dlogits) {
  T dot = 0;
  for (int32_t e = 0; e < n; ++e) dot += g[e] * s[e];
  for (int32_t e = 0; e < n; ++e) dlogits[e] += scale * s[e] * (g[e] - dot);
}

// The softmax over the kept logits alone; a binary gate does not hold it, so it is formed again
// from the scores
template <class T>
void kept_softmax(int32_t n, const T* scores, const T* gates, T* values) {
  T mass = 0;
  for (int32_t e = 0; e < n; ++e) mass += gates[e] != T(0) ? scores[e] : T(0);
  for (int32_t e = 0; e < n; ++e) values[e] = gates[e] != T(0) ? scores[e] / mass : T(0);
}

template <class T>
void route_backward_rows(const RouteBackwardParams& p, int64_t begin, int64_t end) {
  const RouteParams& f = p.forward;
  const int32_t num_routed = f.num_experts - f.num_shared;
  std::vector<T> kept(f.method == RouteMethod::kTopK ? num_routed : 0);
  for (int64_t t = begin; t < end; ++t) {
    const T* gates = static_cast<const T*>(f.gates) + t * f.num_experts + f.num_shared;
    const T* dgates = static_cast<const T*>(p.dgates) + t * f.num_experts + f.num_shared;
    const T* scores = static_cast<const T*>(f.scores) + t * num_routed;
    const T* dscores = p.dscores ? static_cast<const T*>(p.dscores) + t * num_routed : nullptr;
    T* dlogits = static_cast<T*>(p.dlogits) + t * num_routed;
    const T factor = token_factor(f, gates);
    if (f.method == RouteMethod::kTopK || f.method == RouteMethod::kTopP) {
      const T* values = scores;
      if (f.method == RouteMethod::kTopK) {
        kept_softmax(num_routed, scores, gates, kept.data());
        values = kept.data();
      }
      std::fill_n(dlogits, num_routed, T(0));
      add_softmax_backward(num_routed, values, dgates, factor, dlogits);
      if (dscores) add_softmax_backward(num_routed, scores, dscores, T(1), dlogits);
      continue;
    }
    for (int32_t e = 0; e < num_routed; ++e) {
      const T s = scores[e];
      const T slope =
          f.method == RouteMethod::kThreshold ? s * (T(1) - s) : static_cast<T>(above(s, T(0)));
      dlogits[e] = slope * (factor * dgates[e] + (dscores ? dscores[e] : T(0)));
    }
  }
}

}  // namespace

void route(const RouteParams& params, const Team& team) {
  const int chunks = chunk_count(team, params.num_tokens * params.num_experts);
  for_each_chunk(team, chunks, params.num_tokens, [&](int, int64_t begin, int64_t end) {
    params.dtype == Dtype::kFloat64 ? route_rows<double>(params, begin, end)
                                    : route_rows<float>(params, begin, end);
  });
}

void route_backward(const RouteBackwardParams& params, const Team& team) {
  const RouteParams& f = params.forward;
  const int chunks = chunk_count(team, f.num_tokens * f.num_experts);
  for_each_chunk(team, chunks, f.num_tokens, [&](int, int64_t begin, int64_t end) {
    f.dtype == Dtype::kFloat64 ? route_backward_rows<double>(params, begin, end)
                               : route_backward_rows<float>(params, begin, end);
  });
}

}  // namespace dsmoe::cpu

// A matrix of the experts' weights as kernels read it: a neuron's H numbers side by side, 16 bytes aligned.
//
//   [I,H]                rows H numbers apart           gap 0
//   half of [2I,H]       the same
//   half of [E,2S,H]     the same                       gap S: the other half of every expert before
//
// What models have otherwise, such as down_proj [H,I], is copied by the binding unless decode.cu reads it, and so are
// gradients that are not [I,H]: sm90a's `weights`, 192 sums a thread, has no register left for the gap.
#pragma once

#include "cuda/launch.cuh"
#include "kernels.h"

namespace dsmoe::cuda {

template <class T>
struct WeightRows {
  T* first;
  int64_t stride;  // numbers from row to row
  int32_t gap;     // rows between an expert and the next

  // Of the neuron that is the I dimension's `neuron`-th and belongs to `expert`.
  __host__ __device__ int64_t row(int expert, int64_t neuron) const {
    return neuron + static_cast<int64_t>(expert) * gap;
  }
  __device__ __forceinline__ T* at(int expert, int64_t neuron) const {
    return first + row(expert, neuron) * stride;
  }
};

template <class T, class Pointer>
WeightRows<T> weight_rows(Pointer first, const WeightStrides& s, const ExpertMlpParams& p) {
  const int64_t gap = s.expert != 0 ? s.expert / s.neuron - p.intermediate_size / p.num_experts : 0;
  return {static_cast<T*>(first), s.neuron, static_cast<int32_t>(gap)};
}

}  // namespace dsmoe::cuda

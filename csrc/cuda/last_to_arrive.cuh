// CTAs that share a sum each write a part of it; the last of them to finish adds all parts up, in order, so that
// nobody waits and the bits do not depend on who it is.
#pragma once

#include "cuda/launch.cuh"

namespace dsmoe::cuda {

// Whether this CTA is the last of `parts`; `arrived` begins at 0. All of the CTA's threads that wrote have met before,
// is_first is one of them, and any_of(condition) lets them meet again and says whether it holds for one.
template <class AnyOf>
__device__ __forceinline__ bool is_last_to_arrive(unsigned* arrived, int parts, bool is_first,
                                                  AnyOf any_of) {
  bool is_last = false;
  if (is_first) {
    __threadfence();  // the CTA's sums, then the count; the count, then the others' sums
    is_last = atomicAdd(arrived, 1u) == static_cast<unsigned>(parts) - 1;
    __threadfence();
  }
  return any_of(is_last);
}

// any_of for all threads of the CTA
struct AnyOfAll {
  __device__ __forceinline__ bool operator()(bool holds) const { return __syncthreads_or(holds); }
};

}  // namespace dsmoe::cuda

// The GEMMs of expert_mlp's backward on sm_90a, behind the interface of those for every architecture.
#pragma once

#include "cuda/gemm_neurons.cuh"
#include "cuda/gemm_weights.cuh"
#include "cuda/sm90a/forward.h"  // is_available

namespace dsmoe::cuda::sm90a {

#ifdef DSMOE_SM90A
// What every gradient is made of, for the listed pairs; g and u are recomputed if args.saved is null.
template <class T>
Status neurons(const NeuronsArgs<T>& args, int multiprocessors, cudaStream_t on);
template <class T>
Status weights(const AllWeights<T>& all, int multiprocessors, cudaStream_t on);
#else  // a compiler or a list of architectures without sm_90a
template <class T>
Status neurons(const NeuronsArgs<T>&, int, cudaStream_t) {
  return Status::kUnsupported;
}
template <class T>
Status weights(const AllWeights<T>&, int, cudaStream_t) {
  return Status::kUnsupported;
}
#endif

}  // namespace dsmoe::cuda::sm90a

// expert_mlp's two GEMMs on sm_90a, behind the interface of those for every architecture.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/token_pass.cuh"

namespace dsmoe::cuda::sm90a {

constexpr int kStripFloats = 2 * kTokensPerChunk * 192;  // of an SM's strip in `down`, at most

#ifdef DSMOE_SM90A
// Is the current device one of compute capability 9.0, and do the settings want its own path?
bool is_available();
// Sums of each token over its experts, as args.sources say. sums_of_all: args.strips are one matrix for all
// tokens, [Tp, H up to a multiple of 64], not just what the CTAs are at.
template <class T>
Status down(const PassArgs<T>& args, bool sums_of_all, int multiprocessors, cudaStream_t on);
// gate_up, then down, for one pass of tokens; bf16 and fp16.
template <class T>
Status forward(const PassArgs<T>& args, int multiprocessors, cudaStream_t on);
#else  // a compiler or a list of architectures without sm_90a
inline bool is_available() {
  return false;
}
template <class T>
Status down(const PassArgs<T>&, bool, int, cudaStream_t) {
  return Status::kUnsupported;
}
template <class T>
Status forward(const PassArgs<T>&, int, cudaStream_t) {
  return Status::kUnsupported;
}
#endif

// Do the settings ask for nothing that is not there?
inline bool has_wanted_path() {
  return settings().path != Path::kSm90a || is_available();
}

}  // namespace dsmoe::cuda::sm90a

// The forward's two GEMMs on Hopper: as expert_mlp_fwd.cu says, by wgmma and the copy engine.
//
// Same passes, lists, workspace and order of sums as there; only the main loop differs: one CTA on an
// SM, two warpgroups that multiply tiles of 256 rows by 128 or 192 columns of weights and one that
// fetches (pipeline.cuh).
//
// Nothing falls back: the weights are plain [I,H] matrices with H a multiple of 8, so that their rows
// are whole multiples of 16 bytes, which is all that the copy engine asks for.
#define DSMOE_SM90A 1
#include "cuda/sm90a/down.cuh"
#include "cuda/sm90a/forward.h"
#include "cuda/sm90a/gate_up.cuh"
#include "cuda/sm90a/tensor_map.h"

namespace dsmoe::cuda::sm90a {
namespace {

// Experts of min_size to max_size neurons.
template <int kColumns, class T>
bool launch_gate_up(const PassArgs<T>& args, int min_size, int max_size, int ctas,
                    cudaStream_t on) {
  return launch_gates_and_ups(gate_up_kernel<T, kColumns>, args, args, kColumns, min_size, max_size,
                              ctas, on);
}

}  // namespace

bool is_available() {
  int device = 0, major = 0, minor = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0 && encoder() != nullptr;
}

template <class T>
Status down(const PassArgs<T>& args, bool strip_per_unit, int multiprocessors, cudaStream_t on) {
  SourceMaps weights;
  const auto kernel = down_kernel<T>;
  if (!may_use_shared_memory(kernel)) return Status::kCudaError;
  for (int s = 0; s < args.num_sources; ++s) {
    if (!map_matrix(weights.of[s], args.sources[s].weights, args.intermediate_size,
                    args.hidden_size, kTerms)) {
      return Status::kCudaError;
    }
  }
  kernel<<<multiprocessors, kThreads, kSharedBytes, on>>>(args, weights, strip_per_unit);
  return launch_status();
}

template <class T>
Status forward(const PassArgs<T>& args, int multiprocessors, cudaStream_t on) {
  const bool saves = args.saved != nullptr;
  const bool is_up = launch_gate_up<16>(args, 1, 16, multiprocessors, on) &&
                     launch_gate_up<32>(args, 17, 32, multiprocessors, on) &&
                     launch_gate_up<64>(args, 33, saves ? INT32_MAX : 128, multiprocessors, on) &&
                     (saves || launch_gate_up<96>(args, 129, INT32_MAX, multiprocessors, on));
  return is_up ? down(args, false, multiprocessors, on) : Status::kCudaError;
}

template Status down(const PassArgs<__nv_bfloat16>&, bool, int, cudaStream_t);
template Status down(const PassArgs<__half>&, bool, int, cudaStream_t);
template Status forward(const PassArgs<__nv_bfloat16>&, int, cudaStream_t);
template Status forward(const PassArgs<__half>&, int, cudaStream_t);

}  // namespace dsmoe::cuda::sm90a

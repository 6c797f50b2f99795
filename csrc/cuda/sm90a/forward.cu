// The forward's two GEMMs on Hopper: as expert_mlp_fwd.cu says, by wgmma and the copy engine.
//
// Same passes, lists, workspace and order of sums as there; only the main loop differs: one CTA on an
// SM, two warpgroups that multiply tiles of 256 rows by up to 192 columns of weights and one that
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

struct Strip {
  int columns, chunks;  // of y, and of tokens
};

// L2 sets the pace: a step brings the active rows, of 256 tokens say 96, and as many of the weights as a
// strip has columns. The SM that gets the most strips decides.
Strip choose_strip(int64_t num_chunks, int64_t hidden_size, int multiprocessors) {
  Strip best{};
  int64_t least = INT64_MAX;
  for (const Strip strip : {Strip{64, 1}, Strip{128, 1}, Strip{128, 2}, Strip{192, 2}}) {
    const int64_t strips =
        ceil_div<int64_t>(num_chunks, strip.chunks) * ceil_div<int64_t>(hidden_size, strip.columns);
    const int64_t lines =
        ceil_div<int64_t>(strips, multiprocessors) * (strip.chunks * 96 + strip.columns);
    if (lines >= least) continue;
    least = lines;
    best = strip;
  }
  return best;
}

}  // namespace

bool is_available() {
  int device = 0, major = 0, minor = 0;
  return settings().path != Path::kSm80 && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess &&
         major == 9 && minor == 0 && encoder() != nullptr;
}

template <class T>
Status down(const PassArgs<T>& args, bool sums_of_all, int multiprocessors, cudaStream_t on) {
  const Strip strip = args.parts > 1 ? Strip{64, 1}
                                     : choose_strip(args.lists.tables.num_chunks, args.hidden_size,
                                                    multiprocessors);
  const auto kernel = strip.columns == 64    ? down_kernel<T, 64>
                      : strip.columns == 128 ? down_kernel<T, 128>
                                             : down_kernel<T, 192>;
  // Zeros where there is no second source: a launch with the same sizes has the same bytes.
  SourceMaps weights{};
  if (!may_use_shared_memory(kernel)) return failed();
  for (int s = 0; s < args.num_sources; ++s) {
    if (!map_matrix(weights.of[s], args.sources[s].weights, args, kTerms)) {
      return failed(kNoMap);
    }
  }
  kernel<<<multiprocessors, kThreads, kSharedBytes, on>>>(args, weights, strip.chunks, sums_of_all);
  return launch_status();
}

template <class T>
Status forward(const PassArgs<T>& args, int multiprocessors, cudaStream_t on) {
  const bool saves = args.saved != nullptr;
  const bool is_up = launch_gate_up<16>(args, 1, 16, multiprocessors, on) &&
                     launch_gate_up<32>(args, 17, 32, multiprocessors, on) &&
                     launch_gate_up<64>(args, 33, saves ? INT32_MAX : 128, multiprocessors, on) &&
                     (saves || launch_gate_up<96>(args, 129, INT32_MAX, multiprocessors, on));
  return is_up ? down(args, false, multiprocessors, on) : failed(kNoMap);
}

template Status down(const PassArgs<__nv_bfloat16>&, bool, int, cudaStream_t);
template Status down(const PassArgs<__half>&, bool, int, cudaStream_t);
template Status forward(const PassArgs<__nv_bfloat16>&, int, cudaStream_t);
template Status forward(const PassArgs<__half>&, int, cudaStream_t);

}  // namespace dsmoe::cuda::sm90a

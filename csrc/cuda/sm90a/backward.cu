// The backward's GEMMs on Hopper: as expert_mlp_bwd.cu says, by wgmma and the copy engine.
//
//   neurons   in two kernels, the first only where g and u were not saved      neurons.cuh
//   dx        by the forward's down                                            down.cuh
//   weights   all gradients in one launch                                      weights.cuh
//
// Same passes, lists and workspace as there, the main loop of pipeline.cuh. Sums are as fixed: those of dx
// take an expert's dg Wg and du Wu together, which halves how often a strip is read and written.
#define DSMOE_SM90A 1
#include "cuda/sm90a/backward.h"
#include "cuda/sm90a/neurons.cuh"
#include "cuda/sm90a/tensor_map.h"
#include "cuda/sm90a/weights.cuh"

namespace dsmoe::cuda::sm90a {
namespace {

// Experts of min_size to max_size neurons; columns of each box: of gates and ups, and of the rest.
template <int kGateUp, int kRest, class T>
bool launch_neurons(const NeuronsArgs<T>& args, int min_size, int max_size, int ctas,
                    cudaStream_t on) {
  const PassArgs<T>& pass = args.pass;
  auto map = [&](CUtensorMap& boxes, const T* weights, int rows) {
    return map_matrix(boxes, weights, pass.intermediate_size, pass.hidden_size, rows);
  };
  if (args.saved == nullptr) {
    const auto recompute = recompute_kernel<T, kGateUp>;
    CUtensorMap gate, up;
    if (!map(gate, pass.gate_proj, kGateUp) || !map(up, pass.up_proj, kGateUp) ||
        !may_use_shared_memory(recompute)) {
      return false;
    }
    recompute<<<ctas, kThreads, kSharedBytes, on>>>(args, gate, up, min_size, max_size);
  }
  const auto neurons = neurons_kernel<T, kRest>;
  CUtensorMap down;
  if (!map(down, args.down_proj_t, kRest) || !may_use_shared_memory(neurons)) return false;
  neurons<<<ctas, kThreads, kSharedBytes, on>>>(args, down, min_size, max_size);
  return true;
}

}  // namespace

template <class T>
Status neurons(const NeuronsArgs<T>& args, int multiprocessors, cudaStream_t on) {
  const bool is_launched = launch_neurons<32, 16>(args, 1, 32, multiprocessors, on) &&
                           launch_neurons<64, 64>(args, 33, 128, multiprocessors, on) &&
                           launch_neurons<96, 80>(args, 129, INT32_MAX, multiprocessors, on);
  return is_launched ? launch_status() : Status::kCudaError;
}

template <class T>
Status weights(const AllWeights<T>& all, int multiprocessors, cudaStream_t on) {
  const auto kernel = weights_kernel<T>;
  if (!may_use_shared_memory(kernel)) return Status::kCudaError;
  kernel<<<multiprocessors, kThreads, kSharedBytes, on>>>(all);
  return launch_status();
}

template Status neurons(const NeuronsArgs<__nv_bfloat16>&, int, cudaStream_t);
template Status neurons(const NeuronsArgs<__half>&, int, cudaStream_t);
template Status weights(const AllWeights<__nv_bfloat16>&, int, cudaStream_t);
template Status weights(const AllWeights<__half>&, int, cudaStream_t);

}  // namespace dsmoe::cuda::sm90a

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
  const bool is_saved = args.saved != nullptr;
  const auto kernel = is_saved ? neurons_kernel<T, kRest, true> : neurons_kernel<T, kRest, false>;
  CUtensorMap down;
  if (!map_matrix(down, args.down_proj_t, pass, kRest) || !may_use_shared_memory(kernel) ||
      !(is_saved || launch_gates_and_ups(recompute_kernel<T, kGateUp>, args, pass, kGateUp,
                                         min_size, max_size, ctas, on))) {
    return false;
  }
  kernel<<<ctas, kThreads, kSharedBytes, on>>>(args, down, min_size, max_size);
  return true;
}

}  // namespace

template <class T>
Status neurons(const NeuronsArgs<T>& args, int multiprocessors, cudaStream_t on) {
  const bool is_launched = launch_neurons<32, 16>(args, 1, 32, multiprocessors, on) &&
                           launch_neurons<64, 64>(args, 33, 128, multiprocessors, on) &&
                           launch_neurons<96, 80>(args, 129, INT32_MAX, multiprocessors, on);
  return is_launched ? launch_status() : failed(kNoMap);
}

template <class T>
Status weights(const AllWeights<T>& all, int multiprocessors, cudaStream_t on) {
  const auto kernel = weights_kernel<T>;
  if (!may_use_shared_memory(kernel)) return failed();
  GradientTiles::ColumnTiles columns(all.of[0].pass.group_size, all.of[0].pass.hidden_size);
  const int width = columns.all * kGradientColumns;
  columns.all *= all.count;
  kernel<<<multiprocessors, kThreads, kSharedBytes, on>>>(all, columns, width);
  return launch_status();
}

template Status neurons(const NeuronsArgs<__nv_bfloat16>&, int, cudaStream_t);
template Status neurons(const NeuronsArgs<__half>&, int, cudaStream_t);
template Status weights(const AllWeights<__nv_bfloat16>&, int, cudaStream_t);
template Status weights(const AllWeights<__half>&, int, cudaStream_t);

}  // namespace dsmoe::cuda::sm90a

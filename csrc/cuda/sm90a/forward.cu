// The forward's two GEMMs on Hopper: as expert_mlp_fwd.cu says, by wgmma and the copy engine.
//
// Same passes, lists, workspace and order of sums as there; only the main loop differs: one CTA on an
// SM, two warpgroups that multiply tiles of 256 rows by 128 or 192 columns of weights and one that
// fetches (pipeline.cuh).
//
// Nothing falls back: the weights are plain [I,H] matrices with H a multiple of 8, so that their rows
// are whole multiples of 16 bytes, which is all that the copy engine asks for.
#define DSMOE_SM90A 1
#include <type_traits>

#include "cuda/sm90a/down.cuh"
#include "cuda/sm90a/forward.h"
#include "cuda/sm90a/gate_up.cuh"

namespace dsmoe::cuda::sm90a {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver at run time: nothing links to libcuda.
Encode encoder() {
  static const Encode found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &result);
    const bool is_there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return is_there ? reinterpret_cast<Encode>(function) : nullptr;
  }();
  return found;
}

// Boxes of `box_rows` rows by 64 columns of a matrix [rows, columns].
template <class T>
bool map_matrix(CUtensorMap& map, const T* matrix, int64_t rows, int64_t columns, int box_rows) {
  const bool is_bf16 = std::is_same_v<T, __nv_bfloat16>;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {sizes[0] * sizeof(T)};
  const cuuint32_t box[] = {kTerms, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  return encoder()(
             &map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<T*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class Kernel>
bool may_use_shared_memory(Kernel* kernel) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kSharedBytes) == cudaSuccess;
}

// Experts of min_size to max_size neurons.
template <int kColumns, class T>
bool launch_gate_up(const PassArgs<T>& args, int min_size, int max_size, int ctas,
                    cudaStream_t on) {
  CUtensorMap gate, up;
  const auto kernel = gate_up_kernel<T, kColumns>;
  if (!map_matrix(gate, args.gate_proj, args.intermediate_size, args.hidden_size, kColumns) ||
      !map_matrix(up, args.up_proj, args.intermediate_size, args.hidden_size, kColumns) ||
      !may_use_shared_memory(kernel)) {
    return false;
  }
  kernel<<<ctas, kThreads, kSharedBytes, on>>>(args, gate, up, min_size, max_size);
  return true;
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
Status forward(const PassArgs<T>& args, int multiprocessors, cudaStream_t on) {
  CUtensorMap down;
  const bool saves = args.saved != nullptr;
  const bool is_up = launch_gate_up<16>(args, 1, 16, multiprocessors, on) &&
                     launch_gate_up<32>(args, 17, 32, multiprocessors, on) &&
                     launch_gate_up<64>(args, 33, saves ? INT32_MAX : 128, multiprocessors, on) &&
                     (saves || launch_gate_up<96>(args, 129, INT32_MAX, multiprocessors, on));
  const auto kernel = down_kernel<T>;
  if (!is_up || !may_use_shared_memory(kernel) ||
      !map_matrix(down, args.sources[0].weights, args.intermediate_size, args.hidden_size,
                  kTerms)) {
    return Status::kCudaError;
  }
  kernel<<<multiprocessors, kThreads, kSharedBytes, on>>>(args, down);
  return launch_status();
}

template Status forward(const PassArgs<__nv_bfloat16>&, int, cudaStream_t);
template Status forward(const PassArgs<__half>&, int, cudaStream_t);

}  // namespace dsmoe::cuda::sm90a

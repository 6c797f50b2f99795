// The host's side of sm_90a's kernels: what the copy engine is told of a matrix, and shared memory.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "cuda/sm90a/pipeline.cuh"

namespace dsmoe::cuda::sm90a {

using Encode = decltype(&cuTensorMapEncodeTiled);

// From the driver at run time: nothing links to libcuda.
inline Encode encoder() {
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

constexpr const char* kNoMap = "an error of cuTensorMapEncodeTiled";
// Boxes of `box_rows` rows by 64 columns of the pass's weights [I,H].
template <class T>
bool map_matrix(CUtensorMap& map, const WeightRows<const T>& matrix, const PassArgs<T>& pass,
                int box_rows) {
  const int64_t columns = pass.hidden_size;
  const int64_t rows = matrix.row(pass.num_experts - 1, pass.intermediate_size);
  const bool is_bf16 = std::is_same_v<T, __nv_bfloat16>;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {matrix.stride * sizeof(T)};
  const cuuint32_t box[] = {kTerms, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  return encoder()(
             &map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
             const_cast<T*>(matrix.first), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <class Kernel>
bool may_use_shared_memory(Kernel* kernel) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kSharedBytes) == cudaSuccess;
}

// One of the two kernels that multiply x with boxes of gate_proj and up_proj, for experts of min_size to
// max_size neurons. args: that kernel's own, of which `pass` is a part.
template <class Args, class T>
bool launch_gates_and_ups(void (*kernel)(Args, CUtensorMap, CUtensorMap, int, int),
                          const Args& args, const PassArgs<T>& pass, int box_rows, int min_size,
                          int max_size, int ctas, cudaStream_t on) {
  CUtensorMap gate, up;
  if (!map_matrix(gate, pass.gate_proj, pass, box_rows) ||
      !map_matrix(up, pass.up_proj, pass, box_rows) || !may_use_shared_memory(kernel)) {
    return false;
  }
  kernel<<<ctas, kThreads, kSharedBytes, on>>>(args, gate, up, min_size, max_size);
  return true;
}

}  // namespace dsmoe::cuda::sm90a

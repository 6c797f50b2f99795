// What the CUDA kernels take and the CPU's do not: a sentence for every limit, and copies where
// memory alone is at fault.
#pragma once

#include "binding/checks.h"

namespace dsmoe::binding {

constexpr int64_t kCudaCopyBytes = 16;    // of a kernel's copies: where rows may begin
constexpr int64_t kCudaCopyElements = 8;  // of the longest of them: what H and strides divide by

constexpr int64_t kCudaMostElements = int64_t{8} << 32;  // from a matrix's first row to its last

inline void check_cuda_dtype(const Tensor& tensor, const char* name) {
  check(tensor.scalar_type() != ScalarType::Double, name,
        " is float64, which runs on the CPU only: use float32, bfloat16 or float16 on CUDA.");
}

inline void check_cuda_experts(int64_t num_experts) {
  check(num_experts <= cuda::kMaxExperts, "CUDA takes at most ", cuda::kMaxExperts,
        " experts a layer, but there are ", num_experts,
        ": make fewer, larger ones, or move the model to the CPU.");
}

inline void check_cuda_hidden_size(int64_t hidden_size) {
  check(hidden_size % kCudaCopyElements == 0, "CUDA needs a hidden size that is a multiple of ",
        kCudaCopyElements, ", but it is ", hidden_size,
        ": pad the model with zeros, or move it to the CPU.");
}

// The tensor, or a copy where a kernel may begin to read. Kernels on the CPU begin anywhere.
inline Tensor aligned(const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  if (tensor.is_cpu() || address % kCudaCopyBytes == 0) return tensor;
  return as_contiguous(torch::stable::clone(tensor));
}

// Kernels take rows at any distance, on CUDA at multiples of a copy, but the elements of a row side
// by side.
inline Tensor with_dense_rows(const Tensor& tensor) {
  const bool dense = tensor.size(1) <= 1 || tensor.stride(1) == 1;
  const bool fits = tensor.is_cpu() || (row_stride(tensor) % kCudaCopyElements == 0 &&
                                        tensor.size(0) * row_stride(tensor) < kCudaMostElements);
  return dense && fits && tensor.stride(0) >= 0 ? aligned(tensor)
                                                : torch::stable::contiguous(tensor);
}

}  // namespace dsmoe::binding

// Checks and small conversions between torch's stable-ABI tensors and kernels.h. Every message is
// one sentence that says what was wrong; it reaches Python as a RuntimeError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace dsmoe::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Out of line: a call whose checks hold should not carry what the messages need.
template <class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... message) {
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

template <class... Parts>
void check(bool condition, const Parts&... message) {
  if (!condition) fail(message...);
}

// A tensor's shape in a message: made of text only once a check has failed.
struct Shape {
  const Tensor& tensor;
};
inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << "[";
  for (int64_t d = 0; d < shape.tensor.dim(); ++d) out << (d ? ", " : "") << shape.tensor.size(d);
  return out << "]";
}

inline void check_shape(const Tensor& tensor, const char* name,
                        std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (int64_t size : shape) same = same && tensor.size(d++) == size;
  if (same) return;
  std::ostringstream want;
  d = 0;
  for (int64_t size : shape) want << (d++ ? ", " : "") << size;
  fail(name, " must have shape [", want.str(), "], but has ", Shape{tensor}, ".");
}

inline void check_like(const Tensor& tensor, const char* name, const Tensor& like,
                       const char* like_name = "x") {
  check(tensor.device() == like.device(), name, " must be on the same device as ", like_name, ".");
  check(tensor.scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name,
        ".");
}

inline Dtype kernel_dtype(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      break;
  }
  throw std::runtime_error(std::string(name) + " must be float32, bfloat16, float16 or float64.");
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline int64_t row_stride(const Tensor& tensor) {
  return tensor.size(0) <= 1 || tensor.size(1) == 0 ? tensor.size(1) : tensor.stride(0);
}

inline void check_status(Status status) {
#ifdef DSMOE_WITH_CUDA
  check(status != Status::kCudaError, "dsmoe kernel: CUDA says ", cuda::error_name(),
        "; run with CUDA_LAUNCH_BLOCKING=1 to see where.");
#endif
  check(status == Status::kOk, "dsmoe kernel: ", status_string(status), ".");
}

// int32 [E+1], from 0 up to the intermediate size. On CUDA only the shape is checked: reading it
// would wait for the device.
inline Tensor checked_offsets(const Tensor& offsets, int64_t num_experts,
                              int64_t intermediate_size) {
  check(offsets.scalar_type() == ScalarType::Int, "expert_offsets must be int32.");
  check_shape(offsets, "expert_offsets", {num_experts + 1});
  Tensor dense = as_contiguous(offsets);
  if (!dense.is_cpu()) return dense;
  const int32_t* o = static_cast<const int32_t*>(dense.data_ptr());
  bool ascending = o[0] == 0;
  for (int64_t e = 0; e < num_experts; ++e) ascending = ascending && o[e] <= o[e + 1];
  check(ascending, "expert_offsets must start at 0 and never descend.");
  check(intermediate_size < 0 || o[num_experts] == intermediate_size, "expert_offsets ends at ",
        o[num_experts], ", but the weights have ", intermediate_size, " rows.");
  return dense;
}

}  // namespace dsmoe::binding

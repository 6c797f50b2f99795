// One binding body for both devices: run() picks the kernels by the device of a tensor.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "binding/checks.h"
#include "binding/team.h"

namespace dsmoe::binding {

#ifdef DSMOE_WITH_CUDA
cuda::Stream current_cuda_stream(int32_t device_index);
#endif

template <class OnCpu, class OnCuda>
void run(const Tensor& where, const OnCpu& on_cpu, const OnCuda& on_cuda) {
  if (where.is_cpu()) {
    on_cpu(torch_team());
    return;
  }
  check(where.is_cuda(), "dsmoe_ext runs on CPU and CUDA tensors only.");
#ifdef DSMOE_WITH_CUDA
  torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
  cuda::take_settings();
  on_cuda(current_cuda_stream(where.get_device_index()));
#else
  (void)on_cuda;
  check(false,
        "this dsmoe_ext was built without CUDA: install it again with DSMOE_CUDA=1, or move the "
        "model to the CPU.");
#endif
}

}  // namespace dsmoe::binding

// The block after it registers the same functions for both devices.
#define DSMOE_REGISTER(m)                                                \
  static void register_kernels(torch::stable::detail::StableLibrary& m); \
  STABLE_TORCH_LIBRARY_IMPL(dsmoe, CPU, m) {                             \
    register_kernels(m);                                                 \
  }                                                                      \
  STABLE_TORCH_LIBRARY_IMPL(dsmoe, CUDA, m) {                            \
    register_kernels(m);                                                 \
  }                                                                      \
  static void register_kernels(torch::stable::detail::StableLibrary& m)

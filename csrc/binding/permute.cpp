// dsmoe::permute: check, allocate, fill Params, call the device's kernel.
#include <limits>

#include "binding/cuda_limits.h"
#include "binding/device.h"
#include "binding/direct_empty.h"

namespace dsmoe::binding {
namespace {

// token_idx and slot_idx come back with the length T*E that always suffices; the first A =
// pair_offsets[E] entries are valid. So nobody has to wait for a device to learn A.
std::tuple<Tensor, Tensor, Tensor, Tensor> permute(const Tensor& gates_in) {
  check(gates_in.dim() == 2, "gates must have shape [T, E], but has ", Shape{gates_in}, ".");
  PermuteParams p{};
  p.gates_dtype = kernel_dtype(gates_in, "gates");
  check(p.gates_dtype == Dtype::kFloat32 || p.gates_dtype == Dtype::kFloat64,
        "gates must be float32 or float64.");
  if (gates_in.is_cuda()) {
    check_cuda_dtype(gates_in, "gates");
    check_cuda_experts(gates_in.size(1));
  }
  p.num_tokens = gates_in.size(0);
  p.num_experts = static_cast<int32_t>(gates_in.size(1));
  p.capacity = p.num_tokens * p.num_experts;
  check(p.capacity < std::numeric_limits<int32_t>::max(), "gates has ", p.capacity,
        " entries, more than the 2^31 - 1 that int32 lists can count; split the tokens.");
  const Tensor gates = as_contiguous(gates_in);
  const auto int_tensor = [&](int64_t n) { return direct_empty(gates, {n}, ScalarType::Int); };
  Tensor pair_offsets = int_tensor(p.num_experts + 1), token_idx = int_tensor(p.capacity);
  Tensor token_offsets = int_tensor(p.num_tokens + 1), slot_idx = int_tensor(p.capacity);
  p.gates = gates.data_ptr();
  p.pair_offsets = static_cast<int32_t*>(pair_offsets.data_ptr());
  p.token_idx = static_cast<int32_t*>(token_idx.data_ptr());
  p.token_offsets = static_cast<int32_t*>(token_offsets.data_ptr());
  p.slot_idx = static_cast<int32_t*>(slot_idx.data_ptr());
  run(
      gates, [&](const cpu::Team& team) { cpu::permute(p, team); },
      [&](cuda::Stream stream) {
        const Tensor workspace =
            direct_empty(gates, {cuda::permute_workspace_bytes(p)}, ScalarType::Byte);
        check_status(cuda::permute(p, workspace.data_ptr(), stream));
      });
  return {pair_offsets, token_idx, token_offsets, slot_idx};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsmoe, m) {
  m.def(
      "permute(Tensor gates) -> (Tensor pair_offsets, Tensor token_idx, Tensor token_offsets, "
      "Tensor "
      "slot_idx)");
}

DSMOE_REGISTER(m) {
  m.impl("permute", TORCH_BOX(&permute));
}

}  // namespace dsmoe::binding

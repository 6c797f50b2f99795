// dsmoe::expert_mlp and its backward: check, allocate, fill Params, call the device's kernel.
#include "binding/expert_mlp.h"

#include <limits>

#include "binding/cuda_limits.h"
#include "binding/device.h"
#include "binding/direct_empty.h"
#include "binding/kept_memory.h"
#include "binding/ops.h"
#include "binding/packed.h"
#include "binding/weights.h"

namespace dsmoe::binding {

MlpInputs mlp_inputs(const Tensor& x, const Tensor& gates, const Tensor& offsets,
                     int64_t hidden_size, int64_t intermediate_size) {
  check(x.dim() == 2, "x must have shape [T, H], but has ", Shape{x}, ".");
  const Dtype dtype = kernel_dtype(x, "x");
  check(x.size(1) == hidden_size, "x has ", x.size(1),
        " columns, but the weights have hidden size ", hidden_size, ".");
  check(gates.scalar_type() == (dtype == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float),
        "gates must be float32, or float64 if x is.");
  check(gates.dim() == 2 && gates.size(0) == x.size(0),
        "gates must have shape [T, E] with T = ", x.size(0), ", but has ", Shape{gates}, ".");
  check(gates.device() == x.device() && offsets.device() == x.device(),
        "x, gates and expert_offsets must be on one device.");
  if (x.is_cuda()) {
    check_cuda_dtype(x, "x");
    check_cuda_hidden_size(hidden_size);
    check_cuda_experts(gates.size(1));
  }
  check(x.size(0) * std::max<int64_t>(gates.size(1), 1) < std::numeric_limits<int32_t>::max(),
        "T * E must be below 2^31; split the tokens.");
  return {with_dense_rows(x), as_contiguous(gates),
          checked_offsets(offsets, gates.size(1), intermediate_size)};
}

static Activation checked_activation(int64_t activation) {
  check(activation >= 0 && activation <= static_cast<int64_t>(Activation::kGelu),
        "activation must be 0 (silu), 1 (gelu_tanh) or 2 (gelu).");
  return static_cast<Activation>(activation);
}

ExpertMlpParams mlp_params(const MlpInputs& in, int64_t intermediate_size, int64_t activation) {
  ExpertMlpParams p{};
  p.dtype = kernel_dtype(in.x, "x");
  p.num_tokens = in.x.size(0);
  p.hidden_size = in.x.size(1);
  p.intermediate_size = intermediate_size;
  p.num_experts = static_cast<int32_t>(in.gates.size(1));
  p.x_stride = row_stride(in.x);
  p.activation = checked_activation(activation);
  p.x = in.x.data_ptr();
  p.gates = in.gates.data_ptr();
  p.expert_offsets = static_cast<const int32_t*>(in.offsets.data_ptr());
  return p;
}

namespace {

MlpInputs check_inputs(const Tensor& x, const Tensor& gates, const Tensor& offsets,
                       const Weights& weights) {
  MlpInputs in = mlp_inputs(x, gates, offsets, weights.hidden_size(), weights.intermediate_size());
  weights.check_offsets(in.offsets);
  return in;
}

Weights checked_weights(const Tensor& gate_proj, const std::optional<Tensor>& up_proj,
                        const Tensor& down_proj_t, const Tensor& x, bool decodes) {
  kernel_dtype(x, "x");
  check_like(gate_proj, "gate_proj", x);
  return {gate_proj, up_proj, down_proj_t, decodes};
}

// Is it for CUDA's kernels of few tokens?
bool decodes([[maybe_unused]] const Tensor& x, [[maybe_unused]] bool save_activations) {
#ifdef DSMOE_WITH_CUDA
  if (x.is_cuda() && x.dim() == 2) {
    return cuda::decodes(kernel_dtype(x, "x"), x.size(0), save_activations);
  }
#endif
  return false;
}

void forward(const ExpertMlpParams& p, const Tensor& where) {
  run(
      where, [&](const cpu::Team& team) { check_status(cpu::expert_mlp(p, team)); },
      [&](cuda::Stream stream) {
        const Tensor workspace =
            direct_empty(where, {cuda::expert_mlp_workspace_bytes(p)}, ScalarType::Byte);
        check_status(cuda::expert_mlp(p, workspace.data_ptr(), stream));
      });
}

// grad_weight is for the backward alone; it is an argument here because autograd saves the
// forward's arguments.
std::tuple<Tensor, Tensor> expert_mlp(const Tensor& x, const Tensor& gates, const Tensor& gate_proj,
                                      std::optional<Tensor> up_proj, const Tensor& down_proj_t,
                                      const Tensor& expert_offsets,
                                      std::optional<Tensor> /*grad_weight*/, int64_t activation,
                                      bool save_activations, bool allow_tf32) {
  const Weights weights =
      checked_weights(gate_proj, up_proj, down_proj_t, x, decodes(x, save_activations));
  const MlpInputs in = check_inputs(x, gates, expert_offsets, weights);
  ExpertMlpParams p = mlp_params(in, weights.intermediate_size(), activation);
  weights.describe(p);
  Tensor y = direct_empty(in.x, {p.num_tokens, p.hidden_size});
  const int64_t kept = save_activations ? 2 * p.num_tokens * p.intermediate_size : 0;
  Tensor activations = kept_empty(in.x, {kept});
  p.y = y.data_ptr();
  p.activations = kept ? activations.data_ptr() : nullptr;
  p.allow_tf32 = allow_tf32;
  forward(p, in.x);
  return {y, activations};
}

// Whatever is not wanted comes back with 0 elements and costs nothing.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(
    const Tensor& dy_in, const Tensor& x, const Tensor& gates, const Tensor& gate_proj,
    std::optional<Tensor> up_proj, const Tensor& down_proj_t, const Tensor& expert_offsets,
    std::optional<Tensor> grad_weight_in, const Tensor& activations, int64_t activation,
    bool allow_tf32, bool want_dx, bool want_dgates, bool want_dgate_proj, bool want_dup_proj,
    bool want_ddown_proj_t) {
  const Weights weights = checked_weights(gate_proj, up_proj, down_proj_t, x, false);
  const MlpInputs in = check_inputs(x, gates, expert_offsets, weights);
  check_like(dy_in, "dy", x);
  check_shape(dy_in, "dy", {x.size(0), x.size(1)});
  const Tensor dy = with_dense_rows(dy_in);
  ExpertMlpBackwardParams p{};
  p.forward = mlp_params(in, weights.intermediate_size(), activation);
  weights.describe(p.forward);
  const int64_t kept = 2 * p.forward.num_tokens * p.forward.intermediate_size;
  check(activations.numel() == 0 || activations.numel() == kept,
        "activations must be what the forward returned.");
  check_like(activations, "activations", x);
  p.forward.activations = activations.numel() ? activations.data_ptr() : nullptr;
  p.forward.allow_tf32 = allow_tf32;
  std::optional<Tensor> grad_weight;
  if (grad_weight_in) {
    check_like(*grad_weight_in, "grad_weight", in.gates, "gates");
    check_shape(*grad_weight_in, "grad_weight", {in.gates.size(0), in.gates.size(1)});
    grad_weight = as_contiguous(*grad_weight_in);
    p.grad_weight = grad_weight->data_ptr();
  }
  p.dy_stride = row_stride(dy);
  p.dy = dy.data_ptr();
  const auto output = [](bool wanted, const Tensor& like, void*& pointer) {
    Tensor out = wanted ? kept_empty(like, {like.size(0), like.size(1)}) : direct_empty(like, {0});
    pointer = wanted ? out.data_ptr() : nullptr;
    return out;
  };
  Tensor dx = output(want_dx, in.x, p.dx), dgates = output(want_dgates, in.gates, p.dgates);
  Weights::Gradients gradients =
      weights.make_gradients(p, want_dgate_proj, want_dup_proj, want_ddown_proj_t);
  run(
      in.x, [&](const cpu::Team& team) { check_status(cpu::expert_mlp_backward(p, team)); },
      [&](cuda::Stream stream) {
        const Tensor workspace =
            direct_empty(in.x, {cuda::expert_mlp_backward_workspace_bytes(p)}, ScalarType::Byte);
        check_status(cuda::expert_mlp_backward(p, workspace.data_ptr(), stream));
      });
  gradients.finish();
  return {dx, dgates, gradients.gate_proj, gradients.up_proj, gradients.down_proj_t};
}

}  // namespace

Tensor expert_mlp_packed(const Tensor& x, const Tensor& gates, const Tensor& packed,
                         const Tensor& expert_offsets, int64_t hidden_size,
                         int64_t intermediate_size, int64_t activation) {
  check(x.is_cpu() && packed.is_cpu(), "packed weights are for the CPU.");
  const MlpInputs in = mlp_inputs(x, gates, expert_offsets, hidden_size, intermediate_size);
  ExpertMlpParams p = mlp_params(in, intermediate_size, activation);
  check_packed(packed, p);
  Tensor y = direct_empty(in.x, {p.num_tokens, p.hidden_size});
  p.y = y.data_ptr();
  forward(p, in.x);
  return y;
}

STABLE_TORCH_LIBRARY_FRAGMENT(dsmoe, m) {
  m.def(
      "expert_mlp(Tensor x, Tensor gates, Tensor gate_proj, Tensor? up_proj, Tensor down_proj_t, "
      "Tensor expert_offsets, Tensor? grad_weight, int activation, bool save_activations, "
      "bool allow_tf32) -> (Tensor y, Tensor activations)");
  m.def(
      "expert_mlp_backward(Tensor dy, Tensor x, Tensor gates, Tensor gate_proj, Tensor? up_proj, "
      "Tensor down_proj_t, Tensor expert_offsets, Tensor? grad_weight, Tensor activations, "
      "int activation, bool allow_tf32, bool want_dx, bool want_dgates, bool want_dgate_proj, "
      "bool want_dup_proj, bool want_ddown_proj_t) -> (Tensor dx, Tensor dgates, "
      "Tensor dgate_proj, Tensor dup_proj, Tensor ddown_proj_t)");
  m.def(
      "expert_mlp_packed(Tensor x, Tensor gates, Tensor packed, Tensor expert_offsets, "
      "int hidden_size, int intermediate_size, int activation) -> Tensor y");
}

DSMOE_REGISTER(m) {
  m.impl("expert_mlp", TORCH_BOX(&expert_mlp));
  m.impl("expert_mlp_backward", TORCH_BOX(&expert_mlp_backward));
  m.impl("expert_mlp_packed", TORCH_BOX(&expert_mlp_packed));
}

}  // namespace dsmoe::binding

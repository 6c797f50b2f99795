// dsmoe::router: check, allocate, fill Params, call the kernel; on CUDA torch's matrix product.
#include <array>

#include "binding/cuda_limits.h"
#include "binding/device.h"
#include "binding/ops.h"

namespace dsmoe::binding {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  check(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION) == 0,
        "the router's matrix product failed.");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace

Tensor router(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in) {
  check(x_in.dim() == 2 && weight_in.dim() == 2 && x_in.size(1) == weight_in.size(1),
        "x [T, H] and the router's weight [R, H] do not fit: they have shapes ", shape_string(x_in),
        " and ", shape_string(weight_in), ".");
  const ScalarType dtype =
      kernel_dtype(x_in, "x") == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  check(weight_in.scalar_type() == dtype && weight_in.device() == x_in.device(),
        "the router's weight must be float32, or float64 if x is, and on the device of x.");
  if (bias_in) {
    check_like(*bias_in, "the router's bias", weight_in);
    check_shape(*bias_in, "the router's bias", {weight_in.size(0)});
  }
  if (!x_in.is_cpu())
    return linear(x_in.scalar_type() == dtype ? x_in : torch::stable::to(x_in, dtype), weight_in,
                  bias_in);
  const Tensor x = with_dense_rows(x_in), weight = as_contiguous(weight_in);
  std::optional<Tensor> bias;
  if (bias_in) bias = as_contiguous(*bias_in);
  Tensor logits = torch::stable::new_empty(weight, {x.size(0), weight.size(0)});
  RouterParams p{};
  p.dtype = kernel_dtype(x, "x");
  p.num_tokens = x.size(0);
  p.hidden_size = x.size(1);
  p.num_routed = weight.size(0);
  p.x_stride = row_stride(x);
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.logits = logits.data_ptr();
  check_status(cpu::router(p, torch_team()));
  return logits;
}

STABLE_TORCH_LIBRARY_FRAGMENT(dsmoe, m) {
  m.def("router(Tensor x, Tensor weight, Tensor? bias) -> Tensor logits");
}

DSMOE_REGISTER(m) {
  m.impl("router", TORCH_BOX(&router));
}

}  // namespace dsmoe::binding

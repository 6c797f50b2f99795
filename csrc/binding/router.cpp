// dsmoe::router and its backward: check, allocate, fill Params, call the device's kernel. The CPU has
// no kernel for the backward: torch's matrix products make it.
#include "binding/cuda_limits.h"
#include "binding/device.h"
#include "binding/direct_empty.h"
#include "binding/ops.h"

namespace dsmoe::binding {
namespace {

void check_router(const Tensor& x, const Tensor& weight) {
  check(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
        "x [T, H] and the router's weight [R, H] do not fit: they have shapes ", Shape{x}, " and ",
        Shape{weight}, ".");
  const ScalarType dtype =
      kernel_dtype(x, "x") == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  check(weight.scalar_type() == dtype && weight.device() == x.device(),
        "the router's weight must be float32, or float64 if x is, and on the device of x.");
  if (!x.is_cuda()) return;
  check_cuda_dtype(x, "x");
  check_cuda_hidden_size(x.size(1));
}

RouterParams router_params(const Tensor& x, const Tensor& weight) {
  RouterParams p{};
  p.dtype = kernel_dtype(x, "x");
  p.num_tokens = x.size(0);
  p.hidden_size = x.size(1);
  p.num_routed = weight.size(0);
  p.x_stride = row_stride(x);
  p.x = x.data_ptr();
  p.weight = weight.data_ptr();
  return p;
}

std::tuple<Tensor, Tensor> router_backward(const Tensor& dlogits_in, const Tensor& x_in,
                                           const Tensor& weight_in, bool wants_dx,
                                           bool wants_dweight) {
  check_router(x_in, weight_in);
  check_like(dlogits_in, "dlogits", weight_in, "the router's weight");
  check_shape(dlogits_in, "dlogits", {x_in.size(0), weight_in.size(0)});
  const Tensor x = with_dense_rows(x_in), weight = aligned(as_contiguous(weight_in)),
               dlogits = as_contiguous(dlogits_in);
  // whatever is not wanted comes back with 0 elements
  Tensor dx = direct_empty(x, {0}), dweight = direct_empty(weight, {0});
  run(
      x,
      [&](const cpu::Team&) {
        using torch::stable::matmul, torch::stable::to, torch::stable::transpose;
        if (wants_dx) dx = to(matmul(dlogits, weight), x.scalar_type());
        if (wants_dweight) dweight = matmul(transpose(dlogits, 0, 1), to(x, weight.scalar_type()));
      },
      [&](cuda::Stream stream) {
        RouterBackwardParams p{};
        p.forward = router_params(x, weight);
        p.dlogits = dlogits.data_ptr();
        if (wants_dx) {
          dx = direct_empty(x, {x.size(0), x.size(1)});
          p.dx = dx.data_ptr();
        }
        if (wants_dweight) {
          dweight = direct_empty(weight, {weight.size(0), weight.size(1)});
          p.dweight = dweight.data_ptr();
        }
        const Tensor workspace =
            direct_empty(x, {cuda::router_backward_workspace_bytes(p)}, ScalarType::Byte);
        check_status(cuda::router_backward(p, workspace.data_ptr(), stream));
      });
  return {dx, dweight};
}

}  // namespace

Tensor router(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in) {
  check_router(x_in, weight_in);
  if (bias_in) {
    check_like(*bias_in, "the router's bias", weight_in, "the router's weight");
    check_shape(*bias_in, "the router's bias", {weight_in.size(0)});
  }
  const Tensor x = with_dense_rows(x_in), weight = aligned(as_contiguous(weight_in));
  std::optional<Tensor> bias;
  if (bias_in) bias = as_contiguous(*bias_in);
  Tensor logits = direct_empty(weight, {x.size(0), weight.size(0)});
  RouterParams p = router_params(x, weight);
  p.bias = bias ? bias->data_ptr() : nullptr;
  p.logits = logits.data_ptr();
  run(
      x, [&](const cpu::Team& team) { check_status(cpu::router(p, team)); },
      [&](cuda::Stream stream) { check_status(cuda::router(p, stream)); });
  return logits;
}

STABLE_TORCH_LIBRARY_FRAGMENT(dsmoe, m) {
  m.def("router(Tensor x, Tensor weight, Tensor? bias) -> Tensor logits");
  m.def(
      "router_backward(Tensor dlogits, Tensor x, Tensor weight, bool wants_dx, bool wants_dweight) "
      "-> (Tensor dx, Tensor dweight)");
}

DSMOE_REGISTER(m) {
  m.impl("router", TORCH_BOX(&router));
  m.impl("router_backward", TORCH_BOX(&router_backward));
}

}  // namespace dsmoe::binding

// dsmoe::routed_ffn: linear router, route and expert_mlp on packed weights in one call, for inference.
//
// At one token the arithmetic of a small layer takes tens of microseconds, and so would the way
// through Python and the dispatcher for each of its steps.
#include <array>

#include "binding/device.h"
#include "binding/ops.h"

namespace dsmoe::binding {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
  check(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION) == 0,
        "the router's weight must have shape [R, H] and its bias shape [R], in one dtype.");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> routed_ffn(const Tensor& x, const Tensor& router_weight,
                                      std::optional<Tensor> router_bias, const Tensor& threshold,
                                      const Tensor& packed, const Tensor& expert_offsets,
                                      int64_t hidden_size, int64_t intermediate_size,
                                      int64_t method, int64_t top_k, bool binary, bool rescale,
                                      double gate_scale) {
  check(x.dim() == 2 && router_weight.dim() == 2 && x.size(1) == router_weight.size(1),
        "x [T, H] and the router's weight [R, H] do not fit: they have shapes ", shape_string(x),
        " and ", shape_string(router_weight), ".");
  const ScalarType dtype = router_weight.scalar_type();
  const Tensor logits = linear(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype),
                               router_weight, router_bias);
  auto [gates, scores] =
      route(logits, threshold, expert_offsets, method, top_k, binary, rescale, gate_scale);
  Tensor y = expert_mlp_packed(x, gates, packed, expert_offsets, hidden_size, intermediate_size);
  return {y, gates};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsmoe, m) {
  m.def(
      "routed_ffn(Tensor x, Tensor router_weight, Tensor? router_bias, Tensor threshold, Tensor "
      "packed, Tensor expert_offsets, int hidden_size, int intermediate_size, int method, int "
      "top_k, bool binary, bool rescale, float gate_scale) -> (Tensor y, Tensor gates)");
}

DSMOE_REGISTER(m) {
  m.impl("routed_ffn", TORCH_BOX(&routed_ffn));
}

}  // namespace dsmoe::binding

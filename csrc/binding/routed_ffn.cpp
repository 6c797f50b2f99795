// dsmoe::routed_ffn: linear router, route and expert_mlp on packed weights in one call, for inference.
//
// At one token the arithmetic of a small layer takes tens of microseconds, and so would the way
// through Python and the dispatcher for each of its steps.
#include "binding/device.h"
#include "binding/ops.h"

namespace dsmoe::binding {
namespace {

std::tuple<Tensor, Tensor> routed_ffn(const Tensor& x, const Tensor& router_weight,
                                      std::optional<Tensor> router_bias, const Tensor& threshold,
                                      const Tensor& packed, const Tensor& expert_offsets,
                                      int64_t hidden_size, int64_t intermediate_size,
                                      int64_t activation, int64_t method, int64_t top_k,
                                      bool binary, bool rescale, double gate_scale) {
  const Tensor logits = router(x, router_weight, router_bias);
  auto [gates, scores] =
      route(logits, threshold, expert_offsets, method, top_k, binary, rescale, gate_scale);
  Tensor y = expert_mlp_packed(x, gates, packed, expert_offsets, hidden_size, intermediate_size,
                               activation);
  return {y, gates};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsmoe, m) {
  m.def(
      "routed_ffn(Tensor x, Tensor router_weight, Tensor? router_bias, Tensor threshold, Tensor "
      "packed, Tensor expert_offsets, int hidden_size, int intermediate_size, int activation, int "
      "method, int "
      "top_k, bool binary, bool rescale, float gate_scale) -> (Tensor y, Tensor gates)");
}

DSMOE_REGISTER(m) {
  m.impl("routed_ffn", TORCH_BOX(&routed_ffn));
}

}  // namespace dsmoe::binding

// dsmoe::route and its backward: check, allocate, fill Params, call the device's kernel.
#include "binding/cuda_limits.h"
#include "binding/device.h"
#include "binding/direct_empty.h"
#include "binding/ops.h"

namespace dsmoe::binding {
namespace {

struct Options {
  int64_t method, top_k;
  bool binary, rescale;
  double gate_scale;
};

RouteParams route_params(const Tensor& logits, const Tensor& expert_offsets,
                         const Options& options) {
  RouteParams p{};
  p.dtype = kernel_dtype(logits, "logits");
  p.method = static_cast<RouteMethod>(options.method);
  p.num_tokens = logits.size(0);
  p.num_experts = static_cast<int32_t>(expert_offsets.size(0) - 1);
  p.num_shared = p.num_experts - static_cast<int32_t>(logits.size(1));
  p.top_k = static_cast<int32_t>(options.top_k);
  p.binary = options.binary;
  p.rescale = options.rescale;
  p.gate_scale = options.gate_scale;
  p.logits = logits.data_ptr();
  p.expert_offsets = static_cast<const int32_t*>(expert_offsets.data_ptr());
  return p;
}

void check_route(const Tensor& logits, const Tensor& expert_offsets, const Options& options) {
  check(logits.dim() == 2, "logits must have shape [T, R], but has ", Shape{logits}, ".");
  check(logits.scalar_type() == ScalarType::Float || logits.scalar_type() == ScalarType::Double,
        "logits must be float32 or float64.");
  if (logits.is_cuda()) check_cuda_dtype(logits, "logits");
  check(expert_offsets.dim() == 1 && expert_offsets.size(0) > logits.size(1),
        "expert_offsets must have one entry more than there are experts, at least ",
        logits.size(1) + 1, ".");
  check(expert_offsets.device() == logits.device(),
        "expert_offsets must be on the device of logits.");
  check(logits.size(1) > 0, "logits must have at least one column.");
  check(options.method >= 0 && options.method <= 3, "method must be 0 to 3.");
  check(static_cast<RouteMethod>(options.method) != RouteMethod::kTopK ||
            (options.top_k >= 1 && options.top_k <= logits.size(1)),
        "top_k must be between 1 and the number of routed experts, ", logits.size(1), ", but is ",
        options.top_k, ".");
}

Tensor route_backward(const Tensor& dgates_in, std::optional<Tensor> dscores_in,
                      const Tensor& gates_in, const Tensor& scores_in, const Tensor& offsets_in,
                      int64_t method, int64_t top_k, bool binary, bool rescale, double gate_scale) {
  const Options options{method, top_k, binary, rescale, gate_scale};
  check_route(scores_in, offsets_in, options);
  check_like(dgates_in, "dgates", scores_in);
  check_like(gates_in, "gates", scores_in);
  check_shape(gates_in, "gates", {scores_in.size(0), offsets_in.size(0) - 1});
  check_shape(dgates_in, "dgates", {scores_in.size(0), offsets_in.size(0) - 1});
  const Tensor dgates = as_contiguous(dgates_in), gates = as_contiguous(gates_in),
               scores = as_contiguous(scores_in);
  const Tensor offsets = checked_offsets(offsets_in, offsets_in.size(0) - 1, -1);
  RouteBackwardParams p{};
  p.forward = route_params(scores, offsets, options);
  p.forward.gates = gates.data_ptr();
  p.forward.scores = scores.data_ptr();
  std::optional<Tensor> dscores;
  if (dscores_in) {
    check_like(*dscores_in, "dscores", scores);
    check_shape(*dscores_in, "dscores", {scores.size(0), scores.size(1)});
    dscores = as_contiguous(*dscores_in);
    p.dscores = dscores->data_ptr();
  }
  Tensor dlogits = direct_empty(scores, {scores.size(0), scores.size(1)});
  p.dgates = dgates.data_ptr();
  p.dlogits = dlogits.data_ptr();
  run(
      scores, [&](const cpu::Team& team) { cpu::route_backward(p, team); },
      [&](cuda::Stream stream) { check_status(cuda::route_backward(p, stream)); });
  return dlogits;
}

}  // namespace

std::tuple<Tensor, Tensor> route(const Tensor& logits_in, const Tensor& threshold,
                                 const Tensor& offsets_in, int64_t method, int64_t top_k,
                                 bool binary, bool rescale, double gate_scale) {
  const Options options{method, top_k, binary, rescale, gate_scale};
  check_route(logits_in, offsets_in, options);
  check(threshold.numel() == 1 && threshold.scalar_type() == ScalarType::Float &&
            threshold.device() == logits_in.device(),
        "threshold must be one float32 number on the device of logits.");
  const Tensor logits = as_contiguous(logits_in);
  const Tensor offsets = checked_offsets(offsets_in, offsets_in.size(0) - 1, -1);
  RouteParams p = route_params(logits, offsets, options);
  Tensor gates = direct_empty(logits, {p.num_tokens, p.num_experts});
  Tensor scores = direct_empty(logits, {p.num_tokens, logits.size(1)});
  p.threshold = static_cast<const float*>(threshold.data_ptr());
  p.gates = gates.data_ptr();
  p.scores = scores.data_ptr();
  run(
      logits, [&](const cpu::Team& team) { cpu::route(p, team); },
      [&](cuda::Stream stream) { check_status(cuda::route(p, stream)); });
  return {gates, scores};
}

STABLE_TORCH_LIBRARY_FRAGMENT(dsmoe, m) {
  m.def(
      "route(Tensor logits, Tensor threshold, Tensor expert_offsets, int method, int top_k, bool "
      "binary, "
      "bool rescale, float gate_scale) -> (Tensor gates, Tensor scores)");
  m.def(
      "route_backward(Tensor dgates, Tensor? dscores, Tensor gates, Tensor scores, Tensor "
      "expert_offsets, "
      "int method, int top_k, bool binary, bool rescale, float gate_scale) -> Tensor dlogits");
}

DSMOE_REGISTER(m) {
  m.impl("route", TORCH_BOX(&route));
  m.impl("route_backward", TORCH_BOX(&route_backward));
}

}  // namespace dsmoe::binding

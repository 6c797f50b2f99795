// The ops that another op is made of.
#pragma once

#include <tuple>

#include "binding/checks.h"

namespace dsmoe::binding {

Tensor router(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias);

std::tuple<Tensor, Tensor> route(const Tensor& logits, const Tensor& threshold,
                                 const Tensor& expert_offsets, int64_t method, int64_t top_k,
                                 bool binary, bool rescale, double gate_scale);

Tensor expert_mlp_packed(const Tensor& x, const Tensor& gates, const Tensor& packed,
                         const Tensor& expert_offsets, int64_t hidden_size,
                         int64_t intermediate_size, int64_t activation);

}  // namespace dsmoe::binding

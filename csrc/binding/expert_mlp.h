// What expert_mlp and expert_mlp_quantized take alike.
#pragma once

#include "binding/checks.h"

namespace dsmoe::binding {

struct MlpInputs {
  Tensor x, gates, offsets;
};

// Checked, and as kernels read them.
MlpInputs mlp_inputs(const Tensor& x, const Tensor& gates, const Tensor& offsets,
                     int64_t hidden_size, int64_t intermediate_size);

// All but weights and outputs.
ExpertMlpParams mlp_params(const MlpInputs& in, int64_t intermediate_size, int64_t activation);

}  // namespace dsmoe::binding

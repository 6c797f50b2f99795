// Entry points of one ISA's kernels; every ISA has them in its own namespace.
#pragma once

#include "team.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

Status expert_mlp_forward(const ExpertMlpParams& p, const Team& team);
Status expert_mlp_backward(const ExpertMlpBackwardParams& p, const Team& team);
int64_t quantized_bytes(const PackQuantizedParams& p);
Status pack_quantized(const PackQuantizedParams& p, const Team& team);
Status router(const RouterParams& p, const Team& team);
void sigmoids(const float* from, float* to, int64_t n);
const Kernels* kernels();

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

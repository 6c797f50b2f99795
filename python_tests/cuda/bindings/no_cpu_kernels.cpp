// The CPU's entry points for bindings that are to call CUDA's alone: whoever arrives here took the wrong branch.
#include <stdexcept>

#include "cpu/team.h"
#include "kernels.h"

namespace dsmoe::cpu {
namespace {

[[noreturn]] void refuse() {
  throw std::runtime_error("The bindings called a CPU kernel for a tensor on CUDA.");
}

}  // namespace

Status router(const RouterParams&, const Team&) {
  refuse();
}
void route(const RouteParams&, const Team&) {
  refuse();
}
void route_backward(const RouteBackwardParams&, const Team&) {
  refuse();
}
int64_t permute(const PermuteParams&, const Team&) {
  refuse();
}
Status expert_mlp(const ExpertMlpParams&, const Team&) {
  refuse();
}
Status expert_mlp_backward(const ExpertMlpBackwardParams&, const Team&) {
  refuse();
}
int64_t packed_bytes(const PackParams&) {
  refuse();
}
Status pack_weights(const PackParams&, const Team&) {
  refuse();
}
int64_t quantized_bytes(const PackQuantizedParams&) {
  refuse();
}
Status pack_quantized(const PackQuantizedParams&, const Team&) {
  refuse();
}
const char* isa() {
  refuse();
}
void prefer_huge_pages(void*, size_t) {
  refuse();
}

}  // namespace dsmoe::cpu

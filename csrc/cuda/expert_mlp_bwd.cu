// expert_mlp backward. Not written yet: the launcher says so, and training runs on the CPU.
#include "cuda/launch.cuh"

namespace dsmoe::cuda {

int64_t expert_mlp_backward_workspace_bytes(const ExpertMlpBackwardParams&) {
  return 0;
}

Status expert_mlp_backward(const ExpertMlpBackwardParams&, void*, Stream) {
  return Status::kUnsupported;
}

}  // namespace dsmoe::cuda

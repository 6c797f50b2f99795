#include "kernels.h"

namespace dsmoe {

const char* status_string(Status status) {
  switch (status) {
    case Status::kOk:
      return "ok";
    case Status::kUnsupported:
      return "these sizes or this dtype are not supported (CUDA: H and strides are multiples of 8, "
             "rows aligned to 16 bytes, at most 2048 experts, no float64)";
    case Status::kWorkspaceTooSmall:
      return "the workspace is too small";
    case Status::kCudaError:
      return "a CUDA call failed; run with CUDA_LAUNCH_BLOCKING=1 to see where";
  }
  return "unknown status";
}

}  // namespace dsmoe

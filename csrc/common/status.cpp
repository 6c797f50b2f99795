#include "kernels.h"

namespace dsmoe {

const char* status_string(Status status) {
  switch (status) {
    case Status::kOk:
      return "ok";
    case Status::kUnsupported:
      return "these sizes or this dtype are not supported";
    case Status::kWorkspaceTooSmall:
      return "the workspace is too small";
    case Status::kCudaError:
      return "a CUDA call failed; run with CUDA_LAUNCH_BLOCKING=1 to see where";
    case Status::kNoSuchPath:
      return "DSMOE_CUDA_PATH asks for sm90a, which needs a GPU of compute capability 9.0 and a "
             "build for it";
  }
  return "unknown status";
}

}  // namespace dsmoe

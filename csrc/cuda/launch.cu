// The host's side of all launches: the settings of the process, and what CUDA says of a failure.
#include <algorithm>

#include "cuda/launch.cuh"

namespace dsmoe::cuda {
namespace {

thread_local const char* failure = "no error";

}  // namespace

Settings& settings() {
  static Settings current;
  return current;
}

const char* error_name() {
  return failure;
}

Status launch_status() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return Status::kOk;
  failure = cudaGetErrorName(error);
  return Status::kCudaError;
}

Status failed(const char* otherwise) {
  if (launch_status() == Status::kOk) failure = otherwise;
  return Status::kCudaError;
}

int multiprocessor_count() {
  int device = 0, count = 0;
  const auto what = cudaDevAttrMultiProcessorCount;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&count, what, device) != cudaSuccess) {
    return 0;
  }
  const int allowed = settings().multiprocessors;
  return allowed > 0 ? std::min(allowed, count) : count;
}

}  // namespace dsmoe::cuda

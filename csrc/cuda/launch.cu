// The host's side of all launches: the settings of the process, and what CUDA says of a failure.
#include <algorithm>
#include <mutex>

#include "cuda/launch.cuh"

namespace dsmoe::cuda {
namespace {

std::mutex settings_mutex;
Settings settings_of_process;
thread_local Settings settings_taken;
thread_local const char* failure = "no error";

}  // namespace

void set_settings(const Settings& wanted) {
  const std::lock_guard lock(settings_mutex);
  settings_of_process = wanted;
}

void take_settings() {
  const std::lock_guard lock(settings_mutex);
  settings_taken = settings_of_process;
}

const Settings& settings() {
  return settings_taken;
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

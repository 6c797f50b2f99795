// The stream that torch works on, as the cudaStream_t that kernels are launched on.
//
// The stable ABI of torch 2.10 tells a stream's id, not its handle. libtorch_cuda exports the handle
// as a C function, but a CPU torch has no such library, and this file is linked against none: a
// build made beside a CPU torch also serves a CUDA torch. So the function is looked up in the
// library that torch has loaded by the time a CUDA tensor exists.
#include <dlfcn.h>

#include "binding/device.h"

namespace dsmoe::binding {
namespace {

using GetStream = int32_t (*)(int32_t device_index, void** stream);  // 0 = success

GetStream find_get_stream() {
  const char* name = "aoti_torch_get_current_cuda_stream";
  // torch loads its libraries into a scope of their own, where RTLD_DEFAULT does not look.
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return reinterpret_cast<GetStream>(dlsym(library ? library : RTLD_DEFAULT, name));
}

}  // namespace

cuda::Stream current_cuda_stream(int32_t device_index) {
  static const GetStream get_stream = find_get_stream();
  check(
      get_stream,
      "the torch that is loaded has no CUDA streams: use a CUDA build of torch, or move the model "
      "to the CPU.");
  void* stream = nullptr;
  check(get_stream(device_index, &stream) == 0, "torch gave no CUDA stream for device ",
        device_index, ".");
  return stream;
}

}  // namespace dsmoe::binding

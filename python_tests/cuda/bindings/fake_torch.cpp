// Stands between csrc/binding and torch, so that the bindings take their CUDA branch with no GPU: tensors in host
// memory are said to be on CUDA device 0, and every tensor that the bindings make is reported to Python, as memory
// that kernels may touch. The bindings are compiled unchanged and linked with this file; they call torch through
// the C functions of its stable ABI, some of which are here instead.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>

namespace {

struct Hooks {
  // A tensor was made: where its storage is, and whether nothing was written to it yet.
  void (*made)(void* storage, int64_t bytes, int is_empty);
  void* stream;  // what torch's current stream is said to be
};

Hooks hooks;
int guards = 0;  // of the device, alive now

template <class Function>
Function* torchs(Function*, const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}
#define TORCHS(name) torchs(&name, #name)
#define VISIBLE __attribute__((visibility("default")))

void report(AtenTensorHandle tensor, bool is_empty) {
  void* data = nullptr;
  int64_t offset = 0, bytes = 0;
  int32_t dtype = 0;
  aoti_torch_get_data_ptr(tensor, &data);
  aoti_torch_get_storage_offset(tensor, &offset);
  aoti_torch_get_storage_size(tensor, &bytes);
  aoti_torch_get_dtype(tensor, &dtype);
  auto* first = static_cast<unsigned char*>(data);
  hooks.made(first - offset * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)), bytes,
             is_empty);
}

}  // namespace

extern "C" {

VISIBLE void set_hooks(const Hooks* given) {
  hooks = *given;
}

// -- where tensors are --
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = aoti_torch_device_type_cuda();
  return 0;
}
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = 0;
  return 0;
}

// -- the guard and the stream: a stream is asked for under a guard --
AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  ++guards;
  *guard = reinterpret_cast<DeviceGuardHandle>(&guards);
  return index;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) {
  --guards;
  return 0;
}
VISIBLE AOTITorchError aoti_torch_get_current_cuda_stream(int32_t index, void** stream) {
  *stream = hooks.stream;
  return guards == 1 ? index : 1;
}
// cuda_stream.cpp looks for the function above in torch's library for CUDA. There is none.
void* dlopen(const char*, int) noexcept {
  return nullptr;
}

// -- new tensors, on CUDA as the bindings believe --
AOTITorchError aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides,
                                        int32_t dtype, int32_t, int32_t, AtenTensorHandle* tensor) {
  if (const auto error = TORCHS(aoti_torch_empty_strided)(dims, sizes, strides, dtype,
                                                          aoti_torch_device_type_cpu(), 0, tensor))
    return error;
  report(*tensor, true);
  return 0;
}

// -- what the bindings let torch compute: every one of these returns one tensor --
AOTITorchError torch_call_dispatcher(const char* op, const char* overload, StableIValue* stack,
                                     uint64_t version) {
  if (const auto error = TORCHS(torch_call_dispatcher)(op, overload, stack, version)) return error;
  report(reinterpret_cast<AtenTensorHandle>(stack[0]), false);
  return 0;
}

// -- registration: beside the installed package's ops, in a namespace of their own --
AOTITorchError aoti_torch_library_init_impl(const char*, const char* key, const char* file,
                                            uint32_t line, TorchLibraryHandle* library) {
  return TORCHS(aoti_torch_library_init_impl)(NAMESPACE, key, file, line, library);
}
AOTITorchError aoti_torch_library_init_fragment(const char*, const char* file, uint32_t line,
                                                TorchLibraryHandle* library) {
  return TORCHS(aoti_torch_library_init_fragment)(NAMESPACE, file, line, library);
}

}  // extern "C"

// Stands in for the CUDA runtime, so that the launchers run unchanged with no GPU: a launch calls back into Python,
// which interprets the kernel's PTX. Only what the launchers use is here; anything else fails to link.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>

#include "kernels.h"

namespace {

struct Callbacks {
  // returns 0, or a cudaError_t
  int (*launch)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared,
                void** args);
  int (*memset)(size_t address, int value, size_t bytes);
  void (*call)(const char* function, void* stream);  // every call of the runtime; null: takes none
  int multiprocessors;
  int capability;  // 90: compute capability 9.0
  void* stream;    // what the launchers are given
};

Callbacks callbacks;
cudaError_t last_error = cudaSuccess;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> table;
  return table;
}
// Dynamic shared memory that a kernel was allowed beyond the 48 KiB that all have.
std::map<const void*, int>& allowed() {
  static std::map<const void*, int> table;
  return table;
}
constexpr size_t kFreeForAll = 48 << 10;
struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configuration;

// A tensor map as ptx/bulk.py reads it, for matrices of 16-bit numbers; the driver's is opaque. Refuses
// what the driver refuses.
struct TensorMap {
  unsigned magic, type_bytes, rank, swizzle;
  cuuint64_t address, size[2], stride;
  unsigned box[2];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave,
                      CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  const bool is_half =
      type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto start = reinterpret_cast<cuuint64_t>(address);
  const unsigned width = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16u << swizzle;
  if (!is_half || rank != 2 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || steps[0] != 1 ||
      steps[1] != 1 || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE || swizzle > 3) {
    return CUDA_ERROR_NOT_SUPPORTED;  // by this stand-in
  }
  if (reinterpret_cast<size_t>(map) % 64 || start % 16 || strides[0] % 16 || !sizes[0] ||
      !sizes[1] || sizes[0] > 1ull << 32 || sizes[1] > 1ull << 32 || strides[0] >> 40 ||
      box[0] * 2 % 16 || !box[0] || !box[1] || box[0] > 256 || box[1] > 256 ||
      (width && box[0] * 2 > width)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const TensorMap made{0x7E45024D,      2, 2, width, start, {sizes[0], sizes[1]}, strides[0],
                       {box[0], box[1]}};
  *map = {};
  std::memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

void set_callbacks(const Callbacks* given) {
  callbacks = *given;
}

// -- what nvcc's generated host code calls --
void** __cudaRegisterFatBinary(void*) {
  return nullptr;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) {
  return 0;
}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[host] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                     struct CUstream_st* stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                               size_t shared, cudaStream_t stream) {
  callbacks.call("cudaLaunchKernel", stream);
  const auto asked = allowed().find(kernel);
  if (shared > (asked == allowed().end() ? kFreeForAll : asked->second)) {
    return last_error = cudaErrorInvalidValue;
  }
  const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  const int error = callbacks.launch(names().at(kernel).c_str(), g, b, shared, args);
  if (error) last_error = static_cast<cudaError_t>(error);
  return static_cast<cudaError_t>(error);
}

// -- what the launchers call --
cudaError_t cudaGetLastError() {
  callbacks.call("cudaGetLastError", nullptr);
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "another cudaError_t";
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  callbacks.call("cudaFuncSetAttribute", nullptr);
  const int most = (callbacks.capability == 90 ? 227 : 99) << 10;  // 99 of 8.6, 8.9 and 12.0
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > most) {
    return last_error = cudaErrorInvalidValue;
  }
  allowed()[kernel] = value;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  callbacks.call("cudaGetDevice", nullptr);
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  callbacks.call("cudaDeviceGetAttribute", nullptr);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = callbacks.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = callbacks.capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = callbacks.capability % 10;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  callbacks.call("cudaGetDriverEntryPointByVersion", nullptr);
  if (std::string(symbol) != "cuTensorMapEncodeTiled") return cudaErrorInvalidValue;
  *function = reinterpret_cast<void*>(&encode_tiled);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t stream) {
  callbacks.call("cudaMemsetAsync", stream);
  return static_cast<cudaError_t>(
      callbacks.memset(reinterpret_cast<size_t>(address), value, bytes));
}

// -- the entry points of kernels.h, by C names --
using namespace dsmoe;
void set_settings(const cuda::Settings* given) {
  cuda::set_settings(*given);
}
void take_settings() {
  cuda::take_settings();
}
const char* error_name() {
  return cuda::error_name();
}
int run_router(const RouterParams* p, void*) {
  return static_cast<int>(cuda::router(*p, callbacks.stream));
}
int run_router_backward(const RouterBackwardParams* p, void* workspace) {
  return static_cast<int>(cuda::router_backward(*p, workspace, callbacks.stream));
}
int64_t router_backward_workspace(const RouterBackwardParams* p) {
  return cuda::router_backward_workspace_bytes(*p);
}
int run_route(const RouteParams* p, void*) {
  return static_cast<int>(cuda::route(*p, callbacks.stream));
}
int run_route_backward(const RouteBackwardParams* p, void*) {
  return static_cast<int>(cuda::route_backward(*p, callbacks.stream));
}
int run_permute(const PermuteParams* p, void* workspace) {
  return static_cast<int>(cuda::permute(*p, workspace, callbacks.stream));
}
int64_t permute_workspace(const PermuteParams* p) {
  return cuda::permute_workspace_bytes(*p);
}
int run_expert_mlp(const ExpertMlpParams* p, void* workspace) {
  return static_cast<int>(cuda::expert_mlp(*p, workspace, callbacks.stream));
}
int64_t expert_mlp_workspace(const ExpertMlpParams* p) {
  return cuda::expert_mlp_workspace_bytes(*p);
}
int run_expert_mlp_quantized(const ExpertMlpQuantizedParams* p, void* workspace) {
  return static_cast<int>(cuda::expert_mlp_quantized(*p, workspace, callbacks.stream));
}
int64_t expert_mlp_quantized_workspace(const ExpertMlpQuantizedParams* p) {
  return cuda::expert_mlp_quantized_workspace_bytes(*p);
}
int run_expert_mlp_backward(const ExpertMlpBackwardParams* p, void* workspace) {
  return static_cast<int>(cuda::expert_mlp_backward(*p, workspace, callbacks.stream));
}
int64_t expert_mlp_backward_workspace(const ExpertMlpBackwardParams* p) {
  return cuda::expert_mlp_backward_workspace_bytes(*p);
}

}  // extern "C"

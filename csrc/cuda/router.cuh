// Four neighbouring numbers of any dtype, as the router's kernels read and write them: x and dx may be
// half types, everything else and every sum is fp32.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/mma_sm80.cuh"  // the half types, and pack

namespace dsmoe::cuda {

constexpr int kQuad = 4;  // 16 bytes of fp32, 8 of a half type

__device__ __forceinline__ float4 load_quad(const float* from) {
  return *reinterpret_cast<const float4*>(from);
}
__device__ __forceinline__ float4 load_quad(const __nv_bfloat16* from) {
  const uint2 v = *reinterpret_cast<const uint2*>(from);  // bf16 is the upper half of fp32
  return {__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u),
          __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000u)};
}
__device__ __forceinline__ float4 load_quad(const __half* from) {
  const uint2 v = *reinterpret_cast<const uint2*>(from);
  const auto* h = reinterpret_cast<const __half*>(&v);
  return {__half2float(h[0]), __half2float(h[1]), __half2float(h[2]), __half2float(h[3])};
}

__device__ __forceinline__ void store_quad(float* to, const float4& v) {
  __stcg(reinterpret_cast<float4*>(to), v);
}
template <class T>
__device__ __forceinline__ void store_quad(T* to, const float4& v) {
  __stcg(reinterpret_cast<uint2*>(to), uint2{pack(v.x, v.y, T()), pack(v.z, v.w, T())});
}

// Calls launch with a value of x's type.
template <class Launch>
Status dispatch_router_dtype(Dtype dtype, Launch launch) {
  switch (dtype) {
    case Dtype::kFloat32:
      launch(float());
      break;
    case Dtype::kBFloat16:
      launch(__nv_bfloat16());
      break;
    case Dtype::kFloat16:
      launch(__half());
      break;
    default:
      return Status::kUnsupported;
  }
  return launch_status();
}

}  // namespace dsmoe::cuda

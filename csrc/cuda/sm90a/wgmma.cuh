// The instructions of sm_90a that have no C++ spelling: mbarriers, tensor copies, wgmma.
//
// wgmma: the four warps of a warpgroup multiply 64 rows by N columns. Sums of lane l (g = l / 4,
// q = l % 4) of warp w: d[4 j + 2 h + i] is row 16 w + 8 h + g, column 8 j + 2 q + i.
//
// Tiles in shared memory have lines of 128 bytes, whose chunks of 16 bytes are swapped as the copy
// engine does it: chunk c of line r stands at c ^ r % 8. Blocks of eight lines are 1024 bytes.
#pragma once

#include <cuda.h>

#include "cuda/mma_sm80.cuh"

namespace dsmoe::cuda::sm90a {

// ---- mbarriers: a phase ends once all have arrived and all expected bytes have come

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// The copy engine may use the mbarriers that this thread has made.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  uint32_t is_over;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(is_over)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!is_over);
}

// ---- copies

// What this thread stored, or copied with cp.async, can be read by wgmma and overwritten by the copy
// engine.
__device__ __forceinline__ void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// The box of a matrix whose first element is (row, column); zeros beyond the matrix.
__device__ __forceinline__ void copy_box(uint32_t dst, const CUtensorMap& matrix, int row,
                                         int column, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3}], [%4];" ::"r"(dst),
      "l"(&matrix), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// ---- products

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps what follows from reading the sums before wgmma_wait.
template <int kSums>
__device__ __forceinline__ void hold(float (&d)[kSums]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Of a tile whose lines run along the sum: `blocks` is the distance of blocks of eight lines. Of one
// whose lines run across it (64 columns of one term): the distance along the sum; `lines`: that of
// the next 64 columns.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int lines, int blocks) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t(blocks >> 4) << 32 | uint64_t(lines >> 4) << 16 |
         (address >> 4 & 0x3fff);
}

// d += a b^T, both matrices given by their descriptors; kAcrossA, kAcrossB: the lines of a, of b run
// across the sum.
#define SUMS8(i)                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define SUMS16 SUMS8(0), SUMS8(8)
#define SUMS32 SUMS16, SUMS8(16), SUMS8(24)
#define SUMS64 SUMS32, SUMS8(32), SUMS8(40), SUMS8(48), SUMS8(56)
#define SUMS80 SUMS64, SUMS8(64), SUMS8(72)
#define SUMS96 SUMS80, SUMS8(80), SUMS8(88)
#define NAMES16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES32 \
  NAMES16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES64                                                                      \
  NAMES32                                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES80 \
  NAMES64       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES96 \
  NAMES80       \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define DSMOE_WGMMA(type, name, columns, sums, left, right, across_a, across_b)                \
  template <int kAcrossA, int kAcrossB>                                                        \
  __device__ __forceinline__ void wgmma(float (&d)[sums], uint64_t a, uint64_t b, type) {      \
    asm volatile(                                                                              \
        "{ .reg .pred p; setp.ne.b32 p, 1, 0; "                                                \
        "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." name "." name " {" NAMES##sums \
        "}, %" #left ", %" #right ", p, 1, 1, %" #across_a ", %" #across_b "; }"               \
        : SUMS##sums                                                                           \
        : "l"(a), "l"(b), "n"(kAcrossA), "n"(kAcrossB));                                       \
  }
DSMOE_WGMMA(__nv_bfloat16, "bf16", 32, 16, 16, 17, 18, 19)
DSMOE_WGMMA(__nv_bfloat16, "bf16", 64, 32, 32, 33, 34, 35)
DSMOE_WGMMA(__nv_bfloat16, "bf16", 128, 64, 64, 65, 66, 67)
DSMOE_WGMMA(__nv_bfloat16, "bf16", 160, 80, 80, 81, 82, 83)
DSMOE_WGMMA(__nv_bfloat16, "bf16", 192, 96, 96, 97, 98, 99)
DSMOE_WGMMA(__half, "f16", 32, 16, 16, 17, 18, 19)
DSMOE_WGMMA(__half, "f16", 64, 32, 32, 33, 34, 35)
DSMOE_WGMMA(__half, "f16", 128, 64, 64, 65, 66, 67)
DSMOE_WGMMA(__half, "f16", 160, 80, 80, 81, 82, 83)
DSMOE_WGMMA(__half, "f16", 192, 96, 96, 97, 98, 99)
#undef DSMOE_WGMMA
#undef NAMES96
#undef NAMES80
#undef NAMES64
#undef NAMES32
#undef NAMES16
#undef SUMS96
#undef SUMS80
#undef SUMS64
#undef SUMS32
#undef SUMS16
#undef SUMS8

}  // namespace dsmoe::cuda::sm90a

// router, backward: dx [T,H] = dz [T,R] W [R,H]  and  dW [R,H] = dz^T [R,T] x [T,H], in exact fp32
//
// Both are the same product: rows of the result are sums of rows of `right` (W; x), each times a number
// of `left` (dz, along its rows or its columns).
//
//   result [M,H] = left [M,K] right [K,H]      dx: M T, K R      dW: M R, K T
//
// A thread makes 16 rows x 4 columns, so that the 4 numbers of right which it loads for a term are
// worth 64 multiply-adds. No other thread of the CTA needs them: they come straight from global memory,
// eight terms ahead. The numbers of left are the same for all threads, and are broadcast from shared
// memory. 64 threads are 256 columns, by which the usual H divide.
//
// dW of few experts has few tiles and a long sum: its terms are cut into parts, so that they fill a
// chip, and the parts' results are added in order by a kernel of their own. The cut depends on the
// sizes alone, and so do the bits.
#include <algorithm>

#include "cuda/router.cuh"

namespace dsmoe::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kRows = 16;
constexpr int kColumns = kThreads * kQuad;
constexpr int kTerms = 8;       // of a step
constexpr int kPartTerms = 64;  // at least, so that writing a part costs little beside making it

template <class Right, class Result>
struct ProductArgs {
  int64_t rows;     // M
  int64_t columns;  // H
  int64_t terms;    // K
  const float* left;
  int64_t left_row, left_term;  // elements between its rows, and its terms
  const Right* right;           // [K,H]
  int64_t right_stride;
  Result* result;      // [parts,M,H]
  int64_t part_terms;  // of K, a multiple of kTerms
};

// left, term outermost. A warp stores eight terms of four rows, and no two of them to one bank.
__device__ __forceinline__ int left_at(int term, int row) {
  return term * kRows + (row ^ term / 2 % 4 * kQuad);
}

template <class Right, class Result>
__global__ void __launch_bounds__(kThreads)
    router_product_kernel(const __grid_constant__ ProductArgs<Right, Result> args) {
  __shared__ __align__(16) float shared[2][kTerms * kRows];
  constexpr int kCopies = kTerms * kRows / kThreads;  // 2
  const int64_t first_row = int64_t{blockIdx.x} * kRows;
  const int64_t column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kQuad;
  const int64_t begin = blockIdx.z * args.part_terms;
  const int64_t end = min(begin + args.part_terms, args.terms);
  const int term = threadIdx.x % kTerms, row = threadIdx.x / kTerms;  // of left, to copy

  float ahead[kCopies];
  auto fetch = [&](int64_t first_term) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t from_row = first_row + row + i * (kThreads / kTerms), k = first_term + term;
      const bool exists = from_row < args.rows && k < end;
      ahead[i] = exists ? args.left[from_row * args.left_row + k * args.left_term] : 0.f;
    }
  };
  float sums[kRows][kQuad] = {};
  fetch(begin);
  int buffer = 0;
  for (int64_t k = begin; k < end; k += kTerms) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      shared[buffer][left_at(term, row + i * (kThreads / kTerms))] = ahead[i];
    }
    __syncthreads();  // one a step: nobody stores to this buffer again before the next one
    fetch(k + kTerms);
    float4 right[kTerms];
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      const bool exists = k + t < end && column < args.columns;
      right[t] = exists ? load_quad(args.right + (k + t) * args.right_stride + column) : float4{};
    }
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
#pragma unroll
      for (int first = 0; first < kRows; first += kQuad) {
        const float4 left = load_quad(shared[buffer] + left_at(t, first));
        const float of_row[kQuad] = {left.x, left.y, left.z, left.w};
#pragma unroll
        for (int i = 0; i < kQuad; ++i) {
          float (&sum)[kQuad] = sums[first + i];
          sum[0] = fmaf(of_row[i], right[t].x, sum[0]);
          sum[1] = fmaf(of_row[i], right[t].y, sum[1]);
          sum[2] = fmaf(of_row[i], right[t].z, sum[2]);
          sum[3] = fmaf(of_row[i], right[t].w, sum[3]);
        }
      }
    }
    buffer ^= 1;
  }
  if (column >= args.columns) return;
  Result* result = args.result + blockIdx.z * args.rows * args.columns + column;
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (first_row + i >= args.rows) break;
    const float (&sum)[kQuad] = sums[i];
    store_quad(result + (first_row + i) * args.columns, {sum[0], sum[1], sum[2], sum[3]});
  }
}

// result = the sum of the parts, each of `count` numbers. A thread per 4.
__global__ void __launch_bounds__(256)
    sum_parts_kernel(const float* parts, int num_parts, int64_t count, float* result) {
  const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kQuad;
  if (at >= count) return;
  float4 sum{};
  for (int i = 0; i < num_parts; ++i) {
    const float4 part = load_quad(parts + i * count + at);
    sum = {sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w};
  }
  store_quad(result + at, sum);
}

template <class Right, class Result>
void launch_product(const ProductArgs<Right, Result>& args, int parts, cudaStream_t on) {
  const auto rows = static_cast<unsigned>(ceil_div<int64_t>(args.rows, kRows));
  const auto strips = static_cast<unsigned>(ceil_div<int64_t>(args.columns, kColumns));
  if (rows == 0 || strips == 0) return;
  router_product_kernel<<<dim3(rows, strips, parts), kThreads, 0, on>>>(args);
}

// Into how many parts dW's sum over the tokens is cut.
int parts_of(const RouterParams& p) {
  const int64_t tiles =
      ceil_div<int64_t>(p.num_routed, kRows) * ceil_div<int64_t>(p.hidden_size, kColumns);
  const int64_t wanted = ceil_div<int64_t>(settings().router_tiles, std::max<int64_t>(tiles, 1));
  const int64_t most = ceil_div<int64_t>(p.num_tokens, kPartTerms);
  return static_cast<int>(std::max<int64_t>(std::min(wanted, most), 1));
}

template <class T>
void dx(const RouterBackwardParams& p, cudaStream_t on) {
  const RouterParams& f = p.forward;
  ProductArgs<float, T> args{f.num_tokens, f.hidden_size, f.num_routed};
  args.left = static_cast<const float*>(p.dlogits);
  args.left_row = f.num_routed;
  args.left_term = 1;
  args.right = static_cast<const float*>(f.weight);
  args.right_stride = f.hidden_size;
  args.result = static_cast<T*>(p.dx);
  args.part_terms = ceil_div<int64_t>(f.num_routed, kTerms) * kTerms;
  launch_product(args, 1, on);
}

template <class T>
void dweight(const RouterBackwardParams& p, float* workspace, cudaStream_t on) {
  const RouterParams& f = p.forward;
  const int parts = parts_of(f);
  float* dweight = static_cast<float*>(p.dweight);
  ProductArgs<T, float> args{f.num_routed, f.hidden_size, f.num_tokens};
  args.left = static_cast<const float*>(p.dlogits);
  args.left_row = 1;
  args.left_term = f.num_routed;
  args.right = static_cast<const T*>(f.x);
  args.right_stride = f.x_stride;
  args.result = parts > 1 ? workspace : dweight;
  args.part_terms = ceil_div<int64_t>(ceil_div<int64_t>(f.num_tokens, parts), kTerms) * kTerms;
  launch_product(args, parts, on);
  if (parts == 1) return;
  const int64_t count = f.num_routed * f.hidden_size;
  const auto ctas = static_cast<unsigned>(ceil_div<int64_t>(count, 256 * kQuad));
  if (ctas > 0) sum_parts_kernel<<<ctas, 256, 0, on>>>(workspace, parts, count, dweight);
}

}  // namespace

int64_t router_backward_workspace_bytes(const RouterBackwardParams& p) {
  const int parts = p.dweight ? parts_of(p.forward) : 1;
  return parts > 1 ? parts * p.forward.num_routed * p.forward.hidden_size * sizeof(float) : 0;
}

Status router_backward(const RouterBackwardParams& p, void* workspace, Stream stream) {
  if (p.forward.hidden_size % 8 != 0) return Status::kUnsupported;
  return dispatch_router_dtype(p.forward.dtype, [&](auto x) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (p.dx) dx<decltype(x)>(p, on);
    if (p.dweight) dweight<decltype(x)>(p, static_cast<float*>(workspace), on);
  });
}

}  // namespace dsmoe::cuda

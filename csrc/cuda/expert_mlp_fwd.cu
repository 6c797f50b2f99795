// expert_mlp forward: y_t = sum_e G[t,e] * (silu(x_t Wg_e) * (x_t Wu_e)) Wd_e
//
// In bf16 and fp16 with fp32 sums; fp32 goes the same way through exact multiply-adds (gemm_ffma.cuh).
// Two ragged GEMMs around a workspace of activations, both CTA tile / warp tile / mma.m16n8k16 with a
// three-stage cp.async pipeline, swizzled shared memory and ldmatrix:
//
//   gate_up   a[t, e's columns] = G[t,e] * silu(x_t Wg_e) * (x_t Wu_e)      sum over H, rows gathered
//             128 pairs x 64 columns (of Wg and of Wu: both products share the rows of x, and SwiGLU
//             stays in registers). Four warps of 64 x 32: a warp then reads 8 fragments for 32 mma, so
//             tensor cores, not shared memory, set the pace. Experts of at most 32 and 16 neurons get
//             tiles of 32 and 16 columns.
//   down      y[256 tokens, 128 columns] = sum over e of a[tokens of e] Wd_e       sum over neurons
//             A CTA owns its part of y and goes through the experts in order, so that the order of
//             the sum is fixed without float atomics. After each expert it adds the 128 x 128
//             products to a private fp32 strip (128 KiB, written and read through L2), which becomes y
//             at the end. No [A,H] buffer exists.
//
// Tokens go in passes, so that the workspace stays below 256 MiB; lists of pairs are made per pass.
// Rows beyond a ragged end are zeros in shared memory (cp.async without a source); 16-row blocks with
// no pair at all are skipped, dealt to the warps in turn so that all skip alike.
#include "cuda/decode.cuh"
#include "cuda/gemm_down.cuh"
#include "cuda/gemm_ffma.cuh"
#include "cuda/gemm_gate_up.cuh"

namespace dsmoe::cuda {
namespace {

// One CTA: where experts' columns begin (an exclusive sum of sizes rounded up), and which row of
// down_proj_t stands behind a column.
template <class T>
__global__ void __launch_bounds__(kMaxExperts)
    place_columns_kernel(const __grid_constant__ ForwardArgs<T> args) {
  __shared__ int warp_totals[kMaxExperts / kWarp];
  const int expert = threadIdx.x, warp = expert / kWarp, lane = expert % kWarp;
  const bool exists = expert < args.num_experts;
  const int first = exists ? args.expert_offsets[expert] : 0;
  const int size = exists ? args.expert_offsets[expert + 1] - first : 0;
  const int padded = ceil_div(size, kColumnAlign) * kColumnAlign;
  int end = warp_inclusive_sum(padded);
  if (lane == kWarp - 1) warp_totals[warp] = end;
  __syncthreads();
  for (int w = 0; w < warp; ++w) end += warp_totals[w];
  if (exists) args.expert_columns[expert] = end - padded;
  if (expert == args.num_experts - 1) args.expert_columns[args.num_experts] = end;
  // a warp writes the columns of its 32 experts, one expert after the other
  for (int other = 0; other < kWarp; ++other) {
    const int column = __shfl_sync(kAllLanes, end - padded, other);
    const int columns = __shfl_sync(kAllLanes, padded, other);
    const int row = __shfl_sync(kAllLanes, first, other),
              rows = __shfl_sync(kAllLanes, size, other);
    for (int i = lane; i < columns; i += kWarp) {
      args.row_of_column[column + i] = i < rows ? row + i : -1;
    }
  }
}

// Zeros at inactive pairs of small experts, which `down` reads. A thread per 16 bytes.
template <class T>
__global__ void clear_inactive_kernel(const __grid_constant__ ForwardArgs<T> args) {
  const int expert = blockIdx.y;
  const int size = args.expert_offsets[expert + 1] - args.expert_offsets[expert];
  if (size == 0 || size >= SpanIterator::kSmall) return;
  constexpr int kNumbers = 16 / sizeof(T);
  const int chunks = ceil_div(size, kNumbers);
  T* activations = args.activations + args.expert_columns[expert];
  const int64_t count = args.num_tokens * chunks;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += gridDim.x * int64_t{blockDim.x}) {
    const int64_t token = i / chunks;
    if (args.gates[token * args.num_experts + expert] != 0.f) continue;
    const int64_t column = (i - token * chunks) * kNumbers;
    __stcg(reinterpret_cast<uint4*>(activations + token * args.width + column), uint4{});
  }
}

// ------------------------------------------------------------------------------------- launchers

#ifndef DSMOE_CUDA_WORKSPACE_MIB
#define DSMOE_CUDA_WORKSPACE_MIB 256
#endif
constexpr int64_t kWorkspaceLimit = int64_t{DSMOE_CUDA_WORKSPACE_MIB} << 20;
constexpr int64_t kAlign = 256;
constexpr int kCtasPerSm = 2;

int64_t aligned(int64_t bytes) {
  return ceil_div(bytes, kAlign) * kAlign;
}

// Where things lie in the workspace, and how many tokens go in one pass.
struct Layout {
  int64_t width, tokens;  // of a pass, a multiple of kTokensPerChunk
  int64_t expert_columns, row_of_column, strips, tables, pair_offsets, token_idx, activations,
      bytes;
};

PermuteParams pass_permute(const ExpertMlpParams& p, int64_t tokens) {
  PermuteParams q{};
  q.gates_dtype = Dtype::kFloat32;
  q.num_tokens = tokens;
  q.num_experts = p.num_experts;
  q.capacity = tokens * p.num_experts;
  return q;
}

Layout layout(const ExpertMlpParams& p, int ctas) {
  Layout l{};
  l.width =
      ceil_div<int64_t>(p.intermediate_size + (kColumnAlign - 1) * p.num_experts, kColumnAlign) *
      kColumnAlign;
  auto place = [&l](int64_t bytes) {
    const int64_t at = l.bytes;
    l.bytes += aligned(bytes);
    return at;
  };
  l.expert_columns = place((p.num_experts + 1) * 4);
  l.row_of_column = place(l.width * 4);
  l.strips = place(ctas * int64_t{DownTile::kStripFloats} * 4);
  const int64_t per_token = l.width * dtype_size(p.dtype) + p.num_experts * 5;
  const int64_t room = (kWorkspaceLimit - l.bytes) / per_token / kTokensPerChunk;
  const int64_t chunks = ceil_div<int64_t>(p.num_tokens, kTokensPerChunk);
  const int64_t passes = ceil_div(chunks, room > 0 ? room : 1);
  l.tokens = passes > 0 ? ceil_div(chunks, passes) * kTokensPerChunk : 0;
  l.tables = place(permute_workspace_bytes(pass_permute(p, l.tokens)));
  l.pair_offsets = place((p.num_experts + 1) * 4);
  l.token_idx = place(l.tokens * p.num_experts * 4);
  l.activations = place(l.tokens * l.width * dtype_size(p.dtype));
  return l;
}

template <class T, class Tile>
void launch_gate_up(const ForwardArgs<T>& args, int min_size, int max_size, int ctas,
                    cudaStream_t on) {
  gate_up_kernel<T, Tile><<<ctas, kThreads, Tile::kSharedBytes, on>>>(args, min_size, max_size);
}

template <class T>
Status forward(const ExpertMlpParams& p, unsigned char* workspace, cudaStream_t on) {
  const int ctas = multiprocessor_count() * kCtasPerSm;
  if (ctas == 0) return Status::kCudaError;
  const Layout l = layout(p, ctas);
  ForwardArgs<T> args{};
  args.hidden_size = p.hidden_size;
  args.num_experts = p.num_experts;
  args.x_stride = p.x_stride;
  args.gate_proj = static_cast<const T*>(p.gate_proj);
  args.up_proj = static_cast<const T*>(p.up_proj);
  args.down_proj_t = static_cast<const T*>(p.down_proj_t);
  args.expert_offsets = p.expert_offsets;
  args.width = l.width;
  args.expert_columns = reinterpret_cast<int32_t*>(workspace + l.expert_columns);
  args.row_of_column = reinterpret_cast<int32_t*>(workspace + l.row_of_column);
  args.activations = reinterpret_cast<T*>(workspace + l.activations);
  args.strips = reinterpret_cast<float*>(workspace + l.strips);
  place_columns_kernel<<<1, kMaxExperts, 0, on>>>(args);
  for (int64_t first = 0; first < p.num_tokens; first += l.tokens) {
    const int64_t left = p.num_tokens - first;
    args.num_tokens = left < l.tokens ? left : l.tokens;
    args.x = static_cast<const T*>(p.x) + first * p.x_stride;
    args.gates = static_cast<const float*>(p.gates) + first * p.num_experts;
    args.y = static_cast<T*>(p.y) + first * p.hidden_size;
    PermuteParams q = pass_permute(p, args.num_tokens);
    q.gates = args.gates;
    q.pair_offsets = reinterpret_cast<int32_t*>(workspace + l.pair_offsets);
    q.token_idx = reinterpret_cast<int32_t*>(workspace + l.token_idx);
    const Status status = permute(q, workspace + l.tables, on);
    if (status != Status::kOk) return status;
    args.lists = {permute_tables(q, workspace + l.tables), q.pair_offsets, q.token_idx};

    const dim3 clear(ceil_div(ctas, 4), p.num_experts);
    clear_inactive_kernel<<<clear, kThreads, 0, on>>>(args);
    if constexpr (std::is_same_v<T, float>) {
      gate_up_ffma_kernel<<<2 * ctas, kThreads, 0, on>>>(args);  // half the registers
      down_ffma_kernel<<<2 * ctas, kThreads, 0, on>>>(args);
    } else {
      launch_gate_up<T, GateUpTile<16, 4>>(args, 1, 16, ctas, on);
      launch_gate_up<T, GateUpTile<32, 2>>(args, 17, 32, ctas, on);
      launch_gate_up<T, GateUpTile<64, 2>>(args, 33, INT32_MAX, ctas, on);
      down_kernel<<<ctas, kThreads, DownTile::kSharedBytes, on>>>(args);
    }
  }
  return launch_status();
}

bool aligned_16(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

}  // namespace

int64_t expert_mlp_workspace_bytes(const ExpertMlpParams& p) {
  const bool is_decode = p.dtype != Dtype::kFloat32 && p.num_tokens <= kDecodeTokens;
  if (is_decode) return decode_workspace_bytes(p);
  return layout(p, multiprocessor_count() * kCtasPerSm).bytes;
}

Status expert_mlp(const ExpertMlpParams& p, void* workspace, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const bool copies_fit = p.hidden_size % kChunk == 0 && p.x_stride % kChunk == 0 &&
                          aligned_16(p.x) && aligned_16(p.y) && aligned_16(p.gate_proj) &&
                          aligned_16(p.up_proj) && aligned_16(p.down_proj_t);
  if (p.dtype == Dtype::kFloat64 || !copies_fit || p.packed != nullptr ||
      p.num_experts > kMaxExperts) {
    return Status::kUnsupported;
  }
  if (p.num_tokens == 0) return Status::kOk;
  auto* bytes = static_cast<unsigned char*>(workspace);
  if (p.dtype == Dtype::kFloat32) return forward<float>(p, bytes, on);
  if (p.num_tokens <= kDecodeTokens) return decode(p, workspace, stream);
  return p.dtype == Dtype::kBFloat16 ? forward<__nv_bfloat16>(p, bytes, on)
                                     : forward<__half>(p, bytes, on);
}

}  // namespace dsmoe::cuda

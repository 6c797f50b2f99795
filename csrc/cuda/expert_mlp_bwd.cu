// expert_mlp backward; bf16 and fp16 with fp32 sums, fp32 in exact multiply-adds. With a = silu(g) u, g = x Wg_e, u = x Wu_e, all recomputed:
//
//   da = dy_t Wd_e^T         dgates [t,e] = <a, da>         at inactive pairs times grad_weight
//   dx_t   = sum over e of dg Wg_e + du Wu_e                dg = G da u silu'(g),  du = G da silu(g)
//   dWd_e  = sum over t of (G a)^T dy_t    dWg_e = sum over t of dg^T x_t    dWu_e = sum over t of du^T x_t
//
// o_e itself is never formed. Three kinds of GEMM around three matrices [tokens, neurons] in the workspace:
//
//   neurons   g, u and da at once, for the active pairs and those whose grad_weight is not 0    gemm_neurons.cuh
//   down      dx, as the forward sums y: a CTA owns its part and goes through experts in order  gemm_down.cuh
//   weights   one weight gradient, the sum running over the expert's tokens                     gemm_weights.cuh
//
// fp32 does the same on gemm_ffma.cuh's tile (gemm_ffma_bwd.cuh).
//
// What nobody wants is not launched. Tokens go in passes that keep the workspace below 256 MiB (about
// 3300 tokens at H 4096, I 11008); the weight gradients of a later pass are added to those before in the
// gradients' own dtype, as training with micro-batches does. Nothing of the forward is kept.
#include <algorithm>
#include <type_traits>

#include "cuda/gemm_down.cuh"
#include "cuda/gemm_ffma_bwd.cuh"
#include "cuda/gemm_neurons.cuh"
#include "cuda/gemm_weights.cuh"

namespace dsmoe::cuda {
namespace {

struct Layout {
  int64_t tokens;  // of a pass
  int64_t expert_columns, row_of_column, strips, gated, dgate, dup, partial, listed_gates;
  ListsLayout active, listed;
  Carver carver;
};

Layout layout(const ExpertMlpBackwardParams& p, int ctas) {
  const ExpertMlpParams& f = p.forward;
  Layout l{};
  const int64_t width = matrix_width(f), row_bytes = width * dtype_size(f.dtype);
  const int64_t partial_bytes = width / kColumnAlign * 4;
  l.expert_columns = l.carver.place((f.num_experts + 1) * 4);
  l.row_of_column = l.carver.place(width * 4);
  l.strips = l.carver.place(ctas * int64_t{DownTile::kStripFloats} * 4);
  const int64_t per_token = 3 * row_bytes + partial_bytes + f.num_experts * 14;
  l.tokens = tokens_per_pass(f.num_tokens, per_token, l.carver.bytes);
  l.active = place_lists(l.carver, f, l.tokens);
  l.listed = l.active;
  if (p.grad_weight != nullptr) {
    l.listed = place_lists(l.carver, f, l.tokens);
    l.listed_gates = l.carver.place(l.tokens * f.num_experts * 4);
  }
  l.gated = l.carver.place(l.tokens * row_bytes);
  l.dgate = l.carver.place(l.tokens * row_bytes);
  l.dup = l.carver.place(l.tokens * row_bytes);
  l.partial = l.carver.place(l.tokens * partial_bytes);
  return l;
}

template <class T>
Status make_pair_lists(const ExpertMlpBackwardParams& p, const Layout& l, NeuronsArgs<T>& args,
                       unsigned char* workspace, cudaStream_t on) {
  PassArgs<T>& pass = args.pass;
  const Status status =
      make_lists(p.forward, pass.num_tokens, pass.gates, l.active, workspace, on, pass.lists);
  args.listed = pass.lists;
  if (status != Status::kOk || p.grad_weight == nullptr) return status;
  auto* listed = reinterpret_cast<float*>(workspace + l.listed_gates);
  const int64_t count = pass.num_tokens * pass.num_experts;
  const auto ctas = static_cast<unsigned>(std::min<int64_t>(ceil_div<int64_t>(count, 256), 4096));
  list_pairs_kernel<<<ctas, 256, 0, on>>>(count, pass.gates, args.grad_weight, listed);
  return make_lists(p.forward, pass.num_tokens, listed, l.listed, workspace, on, args.listed);
}

template <class T>
void launch_weights(const NeuronsArgs<T>& args, const T* p, const T* q, int64_t q_stride,
                    void* result, bool accumulate, int ctas, cudaStream_t on) {
  if (result == nullptr) return;
  const WeightsArgs<T> weights{args.pass, p, q_stride, q, static_cast<T*>(result), accumulate};
  if constexpr (std::is_same_v<T, float>) {
    weights_ffma_kernel<<<2 * ctas, kThreads, 0, on>>>(weights);
  } else {
    weights_kernel<<<3 * ctas / kCtasPerSm, kThreads, WeightsTile::kSharedBytes, on>>>(weights);
  }
}

template <class T>
void launch_neurons(const NeuronsArgs<T>& args, int ctas, cudaStream_t on) {
  if constexpr (std::is_same_v<T, float>) {
    neurons_ffma_kernel<<<ctas, kThreads, 0, on>>>(args);
  } else {
    cudaFuncSetAttribute(neurons_backward_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         NeuronsTile::kSharedBytes);
    neurons_backward_kernel<T><<<ctas, kThreads, NeuronsTile::kSharedBytes, on>>>(args);
  }
}

template <class T>
void launch_down(const PassArgs<T>& args, int ctas, cudaStream_t on) {
  if constexpr (std::is_same_v<T, float>) {
    down_ffma_kernel<<<2 * ctas, kThreads, 0, on>>>(args);
  } else {
    down_kernel<<<ctas, kThreads, DownTile::kSharedBytes, on>>>(args);
  }
}

template <class T>
Status backward(const ExpertMlpBackwardParams& p, unsigned char* workspace, cudaStream_t on) {
  const ExpertMlpParams& f = p.forward;
  const int ctas = multiprocessor_count() * kCtasPerSm;
  if (ctas == 0) return Status::kCudaError;
  const Layout l = layout(p, ctas);
  NeuronsArgs<T> args{};
  PassArgs<T>& pass = args.pass;
  pass.hidden_size = f.hidden_size;
  pass.num_experts = f.num_experts;
  pass.x_stride = f.x_stride;
  pass.gate_proj = static_cast<const T*>(f.gate_proj);
  pass.up_proj = static_cast<const T*>(f.up_proj);
  pass.expert_offsets = f.expert_offsets;
  pass.width = matrix_width(f);
  pass.expert_columns = reinterpret_cast<int32_t*>(workspace + l.expert_columns);
  pass.row_of_column = reinterpret_cast<int32_t*>(workspace + l.row_of_column);
  pass.strips = reinterpret_cast<float*>(workspace + l.strips);
  args.dy_stride = p.dy_stride;
  args.down_proj_t = static_cast<const T*>(f.down_proj_t);
  args.gated = reinterpret_cast<T*>(workspace + l.gated);
  args.dgate = reinterpret_cast<T*>(workspace + l.dgate);
  args.dup = reinterpret_cast<T*>(workspace + l.dup);
  args.partial = reinterpret_cast<float*>(workspace + l.partial);
  pass.num_sources = 2;
  pass.sources[0] = {args.dgate, pass.gate_proj};
  pass.sources[1] = {args.dup, pass.up_proj};
  place_columns_kernel<<<1, kMaxExperts, 0, on>>>(pass);
  // without tokens one empty pass writes the weight gradients' zeros
  for (int64_t first = 0; first == 0 || first < f.num_tokens; first += l.tokens) {
    pass.num_tokens = std::min(f.num_tokens - first, l.tokens);
    pass.x = static_cast<const T*>(f.x) + first * f.x_stride;
    pass.gates = static_cast<const float*>(f.gates) + first * f.num_experts;
    args.dy = static_cast<const T*>(p.dy) + first * p.dy_stride;
    auto at_pass = [&](const void* base) {  // a [T,E] matrix of floats
      return base == nullptr ? nullptr : static_cast<const float*>(base) + first * f.num_experts;
    };
    args.grad_weight = at_pass(p.grad_weight);
    args.dgates = const_cast<float*>(at_pass(p.dgates));
    const Status status = make_pair_lists(p, l, args, workspace, on);
    if (status != Status::kOk) return status;
    launch_neurons(args, ctas, on);
    if (args.dgates != nullptr) sum_dgates_kernel<T><<<ctas * 4, 256, 0, on>>>(args);
    if (p.dx != nullptr) {
      pass.y = static_cast<T*>(p.dx) + first * f.hidden_size;
      const dim3 clear(ceil_div(ctas, 4), f.num_experts);
      clear_inactive_kernel<<<clear, kThreads, 0, on>>>(pass, args.dgate);
      clear_inactive_kernel<<<clear, kThreads, 0, on>>>(pass, args.dup);
      launch_down(pass, ctas, on);
    }
    const bool later = first > 0;
    launch_weights(args, args.dgate, pass.x, f.x_stride, p.dgate_proj, later, ctas, on);
    launch_weights(args, args.dup, pass.x, f.x_stride, p.dup_proj, later, ctas, on);
    launch_weights(args, args.gated, args.dy, p.dy_stride, p.ddown_proj_t, later, ctas, on);
    if (f.num_tokens == 0) break;
  }
  return launch_status();
}

}  // namespace

int64_t expert_mlp_backward_workspace_bytes(const ExpertMlpBackwardParams& p) {
  return layout(p, multiprocessor_count() * kCtasPerSm).carver.bytes;
}

Status expert_mlp_backward(const ExpertMlpBackwardParams& p, void* workspace, Stream stream) {
  const ExpertMlpParams& f = p.forward;
  bool copies_fit =
      f.hidden_size % kChunk == 0 && f.x_stride % kChunk == 0 && p.dy_stride % kChunk == 0;
  for (const void* pointer :
       {f.x, f.gate_proj, f.up_proj, f.down_proj_t, p.dy, static_cast<const void*>(p.dx)}) {
    copies_fit = copies_fit && aligned_16(pointer);
  }
  if (f.dtype == Dtype::kFloat64 || !copies_fit || f.num_experts > kMaxExperts) {
    return Status::kUnsupported;
  }
  auto* bytes = static_cast<unsigned char*>(workspace);
  const auto on = static_cast<cudaStream_t>(stream);
  if (f.dtype == Dtype::kFloat32) return backward<float>(p, bytes, on);
  return f.dtype == Dtype::kBFloat16 ? backward<__nv_bfloat16>(p, bytes, on)
                                     : backward<__half>(p, bytes, on);
}

}  // namespace dsmoe::cuda

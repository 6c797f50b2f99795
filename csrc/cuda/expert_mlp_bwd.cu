// expert_mlp backward; bf16 and fp16 with fp32 sums, fp32 as tf32 or in exact multiply-adds.
//
// With g = x_t Wg_e, u = x_t Wu_e, a = act(g) u:
//
//   da = dy_t Wd_e^T         dgates [t,e] = <a, da>         at inactive pairs times grad_weight
//   dx_t   = sum over e of dg Wg_e + du Wu_e                dg = G da u act'(g),   du = G da act(g)
//   dWd_e  = sum over t of (G a)^T dy_t    dWg_e = sum over t of dg^T x_t    dWu_e = sum over t of du^T x_t
//
// o_e itself is never formed. Three kinds of GEMM around three matrices [tokens, neurons] in the workspace:
//
//   neurons   g, u and da at once, for the active pairs and those whose grad_weight is not 0    gemm_neurons.cuh
//   down      dx, as the forward sums y: a CTA owns its part and goes through experts in order  gemm_down.cuh
//   weights   one weight gradient, the sum running over the expert's tokens                     gemm_weights.cuh
//
// Exact fp32 does the same on gemm_ffma.cuh's tile (gemm_ffma_bwd.cuh), half types on Hopper by wgmma
// (sm90a/backward.cu).
//
// g and u of active pairs are what the forward saved (2 T I numbers of the caller's memory, 361 MB in bf16
// at T 8192, I 11008), or are recomputed from x: 2/9 more work of the forward and backward together.
//
// What nobody wants is not launched. The workspace stays below 256 MiB by going in passes, each a rectangle of tokens
// by neurons (columns of the three matrices): within one, kernels see the experts clipped to it. Sums over several
// passes are fp32 to the end, in the workspace for half types and in the results themselves for fp32: dx and dgates
// over the passes along the neurons, weight gradients over those along the tokens. There is room for one of the two:
//
//   tokens of one pass   (9984 at H 4096) go through the neurons once; T 8192, I 11008: 5 passes
//   more, in half types  go through the tokens for dx and dgates, and once more, through the neurons, for
//                        the weight gradients: 3/8 more work (saved: 1/6), if both are wanted
//
// Every expert begins at a multiple of 16 columns, and only the device knows the experts' sizes. So the host launches
// passes for as many columns as there may be, and the device cuts those that there are; the last may be empty.
#include <algorithm>
#include <type_traits>

#include "cuda/gemm_down.cuh"
#include "cuda/gemm_ffma_bwd.cuh"
#include "cuda/gemm_neurons.cuh"
#include "cuda/gemm_weights.cuh"
#include "cuda/sm90a/backward.h"

namespace dsmoe::cuda {
namespace {

struct Layout {
  int64_t tokens, width;  // of a pass; width: columns at most
  int64_t all_columns;    // [E+1]   first column of an expert, before passes are cut
  int64_t expert_offsets, expert_columns, row_of_column, sums, gated, dgate, dup, partial;
  int64_t listed_gates;
  ListsLayout active, listed;
  Carver carver;
};

constexpr int kPassColumns = 64;  // that passes are cut at multiples of

int64_t strips_per_chunk(const ExpertMlpParams& f) {
  return ceil_div<int64_t>(f.hidden_size, DownTile::kTileN);
}

// Five eighths of the workspace are for sums of dx and for lists: that decides how many tokens a pass
// takes, as long as the rest, for the matrices [tokens, width], holds 256 columns or more.
Layout layout(const ExpertMlpBackwardParams& p) {
  const ExpertMlpParams& f = p.forward;
  const int64_t size = dtype_size(f.dtype), experts = f.num_experts;
  const bool has_sums = f.dtype != Dtype::kFloat32;
  const int64_t chunk_sums = has_sums ? strips_per_chunk(f) * DownTile::kStripFloats * 4 : 0;
  const int64_t chunk_bytes = chunk_sums + (p.grad_weight ? 14 : 5) * kTokensPerChunk * experts;
  auto matrix_bytes = [&](int64_t tokens) {  // a column of the three, and of partial
    return tokens * 3 * size + tokens * 4 / kColumnAlign;
  };
  const int64_t all = matrix_width(f), least = std::clamp<int64_t>(all, 1, 256);
  // small tables, and rounding up
  const int64_t limit = settings().workspace_bytes - 4 * all - 64 * experts - 8192;
  const int64_t most = std::min(limit * 5 / 8 / chunk_bytes * kTokensPerChunk,
                                limit * 3 / 8 / ((matrix_bytes(1) + 1) * least));
  Layout l{};
  l.tokens = per_pass<int64_t>(f.num_tokens, kTokensPerChunk, most);
  const int64_t chunks = l.tokens / kTokensPerChunk;
  int64_t columns = (limit - chunks * chunk_bytes) / std::max<int64_t>(matrix_bytes(l.tokens), 1);
  if (has_sums && f.num_tokens > l.tokens) {  // the same room must hold sums of weight gradients
    columns =
        std::min(columns, chunks * chunk_sums / (3 * 4 * std::max<int64_t>(f.hidden_size, 1)));
  }
  l.width = per_pass<int64_t>(all, kPassColumns, columns);
  l.all_columns = l.carver.place((experts + 1) * 4);
  l.expert_offsets = l.carver.place((experts + 1) * 4);
  l.expert_columns = l.carver.place((experts + 1) * 4);
  l.row_of_column = l.carver.place(std::max(all, l.width) * 4);
  l.sums = l.carver.place(chunks * chunk_sums);
  l.active = place_lists(l.carver, f, l.tokens);
  l.listed = l.active;
  if (p.grad_weight != nullptr) {
    l.listed = place_lists(l.carver, f, l.tokens);
    l.listed_gates = l.carver.place(l.tokens * experts * 4);
  }
  l.gated = l.carver.place(l.tokens * l.width * size);
  l.dgate = l.carver.place(l.tokens * l.width * size);
  l.dup = l.carver.place(l.tokens * l.width * size);
  l.partial = l.carver.place(l.tokens * l.width * 4 / kColumnAlign);
  return l;
}

// One CTA: the experts' offsets, clipped to the rows behind a pass's columns; `columns` has the first one of
// every expert. As many passes as passes of `most` columns would take, of equal width. Both they and
// experts begin at multiples of kColumnAlign: no gap is cut.
__global__ void clip_experts_kernel(const int32_t* offsets, const int32_t* columns, int num_experts,
                                    int pass, int most, int32_t* clipped) {
  const int width = per_pass(columns[num_experts], kPassColumns, most);
  const int first = pass * width, end = first + width;
  __shared__ int first_row, end_row;
  if (threadIdx.x == 0) first_row = end_row = offsets[num_experts];  // beyond the last column
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += blockDim.x) {
    auto lies_in = [&](int column) { return columns[e] <= column && column < columns[e + 1]; };
    if (lies_in(first)) first_row = offsets[e] + first - columns[e];
    if (lies_in(end)) end_row = offsets[e] + end - columns[e];
  }
  __syncthreads();
  for (int e = threadIdx.x; e <= num_experts; e += blockDim.x) {
    clipped[e] = min(max(offsets[e], first_row), end_row);
  }
}

// 1 where an inactive pair wants its dgates, and at active pairs if they are to be listed too, else 0:
// gates for a list of pairs.
__global__ void list_pairs_kernel(int64_t count, const float* gates, const float* grad_weight,
                                  bool with_active, float* listed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += gridDim.x * int64_t{blockDim.x}) {
    listed[i] = (gates[i] != 0.f ? with_active : grad_weight[i] != 0.f) ? 1.f : 0.f;
  }
}

struct Wanted {
  bool tokens, weights;  // dx and dgates; weight gradients
};

template <class T>
class Backward {
 public:
  Backward(const ExpertMlpBackwardParams& p, unsigned char* workspace, int ctas, cudaStream_t on)
      : p_(p),
        f_(p.forward),
        l_(layout(p)),
        workspace_(workspace),
        ctas_(ctas),
        on_(on),
        on_hopper_(p.forward.intermediate_size > 0 && p.forward.hidden_size > 0 &&
                   sm90a::is_available()),
        column_passes_(l_.width > 0 ? ceil_div(matrix_width(f_), l_.width) : 1) {
    PassArgs<T>& pass = args_.pass;
    pass.hidden_size = f_.hidden_size;
    pass.num_experts = f_.num_experts;
    pass.group_size = settings().group_size;
    pass.intermediate_size = f_.intermediate_size;
    pass.x_stride = f_.x_stride;
    pass.gate_proj = weight_rows<const T>(f_.gate_proj, f_.gate_up, f_);
    pass.up_proj = weight_rows<const T>(f_.up_proj, f_.gate_up, f_);
    pass.logistic = Logistic::of(f_.activation);
    pass.exact = ExactActivation::of(f_.activation);
    pass.expert_offsets = at<int32_t>(l_.expert_offsets);
    pass.width = l_.width;
    pass.expert_columns = at<int32_t>(l_.expert_columns);
    pass.row_of_column = at<int32_t>(l_.row_of_column);
    pass.strips = at<float>(l_.sums);
    args_.dy_stride = p_.dy_stride;
    args_.down_proj_t = weight_rows<const T>(f_.down_proj_t, f_.down, f_);
    args_.gated = at<T>(l_.gated);
    args_.dgate = at<T>(l_.dgate);
    args_.dup = at<T>(l_.dup);
    args_.partial = at<float>(l_.partial);
    pass.num_sources = 2;
    pass.sources[0] = {args_.dgate, pass.gate_proj};
    pass.sources[1] = {args_.dup, pass.up_proj};
  }

  Status run() {
    const bool weights =
        p_.dgate_proj != nullptr || p_.dup_proj != nullptr || p_.ddown_proj_t != nullptr;
    const bool dx_in_parts = p_.dx != nullptr && sizeof(T) == 2 && f_.num_tokens > l_.tokens;
    // without tokens one empty pass writes the weight gradients' zeros
    const int64_t token_passes = l_.tokens > 0 ? ceil_div(f_.num_tokens, l_.tokens) : 1;
    place_all_columns();
    for (int64_t t = 0; t < token_passes && dx_in_parts; ++t) {
      for (int64_t c = 0; c < column_passes_; ++c) run_pass(t, c, {true, false});
    }
    for (int64_t c = 0; c < column_passes_ && (weights || !dx_in_parts); ++c) {
      for (int64_t t = 0; t < token_passes; ++t) run_pass(t, c, {!dx_in_parts, true});
    }
    return status_ == Status::kOk ? launch_status() : status_;
  }

 private:
  template <class U>
  U* at(int64_t offset) {
    return reinterpret_cast<U*>(workspace_ + offset);
  }

  void place_all_columns() {
    PassArgs<T> all = args_.pass;
    all.expert_offsets = f_.expert_offsets;
    all.expert_columns = at<int32_t>(l_.all_columns);
    place_columns(all, matrix_width(f_), on_);
  }

  void run_pass(int64_t token_pass, int64_t column_pass, Wanted wanted) {
    if (column_pass != column_pass_) take_columns(column_pass);
    if (token_pass != token_pass_) take_tokens(token_pass);
    launch_neurons();
    if (wanted.tokens && args_.dgates != nullptr) {
      sum_dgates_kernel<T><<<ctas_ * 4, 256, 0, on_>>>(args_);
    }
    if (wanted.tokens && p_.dx != nullptr) {
      const dim3 clear(ceil_div(ctas_, 4), f_.num_experts);
      clear_inactive_kernel<<<clear, kThreads, 0, on_>>>(args_.pass, args_.dgate);
      clear_inactive_kernel<<<clear, kThreads, 0, on_>>>(args_.pass, args_.dup);
      launch_down();
    }
    if (wanted.weights) launch_weights();
  }

  // What the forward saved of active pairs is read; the rest of the listed pairs is computed from x.
  void launch_neurons() {
    NeuronsArgs<T> args = args_;
    if (args.saved != nullptr) {
      args.listed = args.pass.lists;
      launch_neurons<true>(args);
      if (p_.grad_weight == nullptr) return;
    }
    args.listed = args_.listed;
    args.saved = nullptr;
    launch_neurons<false>(args);
  }

  template <bool kSaved>
  void launch_neurons(const NeuronsArgs<T>& args) {
    if constexpr (std::is_same_v<T, float>) {
      if (!f_.allow_tf32) {
        neurons_ffma_kernel<T, kSaved><<<ctas_, kThreads, 0, on_>>>(args);
        return;
      }
    } else if (on_hopper_) {
      note(sm90a::neurons(args, ctas_ / kCtasPerSm, on_));
      return;
    }
    using Narrow = NeuronsTile<T, kSaved, 1>;
    launch_tiles<Narrow>(args, 1, Narrow::kTileN);
    launch_tiles<NeuronsTile<T, kSaved, 2>>(args, Narrow::kTileN + 1, INT32_MAX);
  }

  template <class Tile>
  void launch_tiles(const NeuronsArgs<T>& args, int min_size, int max_size) {
    const auto kernel = neurons_backward_kernel<T, Tile>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::kSharedBytes);
    kernel<<<ctas_, kThreads, Tile::kSharedBytes, on_>>>(args, min_size, max_size);
  }

  void launch_down() {
    if constexpr (std::is_same_v<T, float>) {
      if (!f_.allow_tf32) {
        down_ffma_kernel<<<2 * ctas_, kThreads, 0, on_>>>(args_.pass);
        return;
      }
    } else if (on_hopper_) {
      note(sm90a::down(args_.pass, true, ctas_ / kCtasPerSm, on_));
      return;
    }
    down_kernel<<<ctas_, kThreads, DownTile::kSharedBytes, on_>>>(args_.pass);
  }

  void note(Status status) {
    if (status != Status::kOk) status_ = status;
  }

  void take_columns(int64_t column_pass) {
    column_pass_ = column_pass;
    args_.pass.turn = {column_pass == 0, column_pass + 1 == column_passes_};
    clip_experts_kernel<<<1, kExpertThreads, 0, on_>>>(
        f_.expert_offsets, at<int32_t>(l_.all_columns), f_.num_experts,
        static_cast<int>(column_pass), static_cast<int>(l_.width), at<int32_t>(l_.expert_offsets));
    place_columns(args_.pass, l_.width, on_);
  }

  void take_tokens(int64_t token_pass) {
    token_pass_ = token_pass;
    PassArgs<T>& pass = args_.pass;
    const int64_t first = token_pass * l_.tokens, experts = f_.num_experts;
    pass.num_tokens = std::min(f_.num_tokens - first, l_.tokens);
    pass.x = static_cast<const T*>(f_.x) + first * f_.x_stride;
    if (f_.activations != nullptr) {
      args_.saved = static_cast<const T*>(f_.activations) + first * 2 * f_.intermediate_size;
    }
    pass.y = static_cast<T*>(p_.dx) + first * f_.hidden_size;
    args_.dy = static_cast<const T*>(p_.dy) + first * p_.dy_stride;
    auto rows = [&](const void* matrix) {  // of a [T,E] matrix of floats
      return matrix == nullptr ? nullptr : static_cast<const float*>(matrix) + first * experts;
    };
    pass.gates = rows(f_.gates);
    args_.grad_weight = rows(p_.grad_weight);
    args_.dgates = const_cast<float*>(rows(p_.dgates));
    weights_turn_ = {first == 0, first + pass.num_tokens == f_.num_tokens};
    make_pair_lists();
  }

  void make_pair_lists() {
    PassArgs<T>& pass = args_.pass;
    make(pass.gates, l_.active, pass.lists);
    args_.listed = pass.lists;
    if (p_.grad_weight == nullptr) return;
    auto* listed = at<float>(l_.listed_gates);
    const int64_t count = pass.num_tokens * pass.num_experts;
    const auto ctas = static_cast<unsigned>(std::min<int64_t>(ceil_div<int64_t>(count, 256), 4096));
    if (count > 0) {
      list_pairs_kernel<<<ctas, 256, 0, on_>>>(count, pass.gates, args_.grad_weight,
                                               args_.saved == nullptr, listed);
    }
    make(listed, l_.listed, args_.listed);
  }

  void make(const float* gates, const ListsLayout& l, PairLists& lists) {
    note(make_lists(f_, args_.pass.num_tokens, gates, l, workspace_, on_, lists));
  }

  void launch_weights() {
    AllWeights<T> all;
    auto want = [&](int matrix, const T* p, const T* q, int64_t q_stride, void* result) {
      if (result == nullptr) return;
      float* sums = at<float>(l_.sums) + matrix * l_.width * f_.hidden_size;
      all.of[all.count++] = {args_.pass,   p, q_stride, q, static_cast<T*>(result), sums,
                             weights_turn_};
    };
    want(0, args_.dgate, args_.pass.x, f_.x_stride, p_.dgate_proj);
    want(1, args_.dup, args_.pass.x, f_.x_stride, p_.dup_proj);
    want(2, args_.gated, args_.dy, p_.dy_stride, p_.ddown_proj_t);
    if (all.count == 0) return;
    if constexpr (std::is_same_v<T, float>) {
      if (!f_.allow_tf32) {
        for (int i = 0; i < all.count; ++i) {
          weights_ffma_kernel<<<2 * ctas_, kThreads, 0, on_>>>(all.of[i]);
        }
        return;
      }
    } else if (on_hopper_) {
      note(sm90a::weights(all, ctas_ / kCtasPerSm, on_));
      return;
    }
    for (int i = 0; i < all.count; ++i) {
      weights_kernel<<<ctas_, kThreads, WeightsTile<T>::kSharedBytes, on_>>>(all.of[i]);
    }
  }

  const ExpertMlpBackwardParams& p_;
  const ExpertMlpParams& f_;
  const Layout l_;
  unsigned char* const workspace_;
  const int ctas_;
  const cudaStream_t on_;
  const bool on_hopper_;
  const int64_t column_passes_;
  NeuronsArgs<T> args_{};
  int64_t token_pass_ = -1, column_pass_ = -1;
  Turn weights_turn_;
  Status status_ = Status::kOk;
};

template <class T>
Status backward(const ExpertMlpBackwardParams& p, unsigned char* workspace, cudaStream_t on) {
  const int ctas = multiprocessor_count() * kCtasPerSm;
  if (ctas == 0) return failed();
  return Backward<T>(p, workspace, ctas, on).run();
}

}  // namespace

int64_t expert_mlp_backward_workspace_bytes(const ExpertMlpBackwardParams& p) {
  return layout(p).carver.bytes;
}

Status expert_mlp_backward(const ExpertMlpBackwardParams& p, void* workspace, Stream stream) {
  const ExpertMlpParams& f = p.forward;
  bool copies_fit =
      f.hidden_size % kChunk == 0 && f.x_stride % kChunk == 0 && p.dy_stride % kChunk == 0;
  for (const auto& s : {f.gate_up, f.down}) copies_fit = copies_fit && reads(s, f.hidden_size);
  for (const auto& s : {p.dgate_up, p.ddown}) copies_fit = copies_fit && writes(s, f.hidden_size);
  const std::initializer_list<const void*> all = {f.x,           f.gate_proj, f.up_proj,
                                                  f.down_proj_t, p.dy,        p.dx,
                                                  p.dgate_proj,  p.dup_proj,  p.ddown_proj_t};
  for (const void* pointer : all) copies_fit = copies_fit && aligned_16(pointer);
  if (f.dtype == Dtype::kFloat64 || !copies_fit || f.num_experts > kMaxExperts) {
    return Status::kUnsupported;
  }
  auto* bytes = static_cast<unsigned char*>(workspace);
  const auto on = static_cast<cudaStream_t>(stream);
  if (f.dtype == Dtype::kFloat32) return backward<float>(p, bytes, on);
  if (!sm90a::has_wanted_path()) return Status::kNoSuchPath;
  return f.dtype == Dtype::kBFloat16 ? backward<__nv_bfloat16>(p, bytes, on)
                                     : backward<__half>(p, bytes, on);
}

}  // namespace dsmoe::cuda

// expert_mlp forward: y_t = sum_e G[t,e] * (act(x_t Wg_e) * (x_t Wu_e)) Wd_e
//
// In bf16 and fp16 with fp32 sums. fp32 goes the same way as tf32 where that is allowed, else through exact
// multiply-adds (gemm_ffma.cuh).
// Two ragged GEMMs around a workspace of activations, both CTA tile / warp tile / mma.sync with a
// three-stage cp.async pipeline, swizzled shared memory and ldmatrix:
//
//   gate_up   a[t, e's columns] = G[t,e] * act(x_t Wg_e) * (x_t Wu_e)       sum over H, rows gathered
//             128 pairs x 64 columns (of Wg and of Wu: both products share the rows of x, and SwiGLU
//             stays in registers). Four warps of 64 x 32: a warp then reads 8 fragments for 32 mma, so
//             tensor cores, not shared memory, set the pace. Experts of at most 32 and 16 neurons get
//             tiles of 32 and 16 columns.
//   down      y[256 tokens, 128 columns] = sum over e of a[tokens of e] Wd_e       sum over neurons
//             A CTA owns its part of y and goes through the experts in order, so that the order of
//             the sum is fixed without float atomics. After each expert it adds the 128 x 128
//             products to a private fp32 strip (128 KiB, written and read through L2), which becomes y
//             at the end; if y is fp32, they are added to y itself. No [A,H] buffer exists.
//
// For the backward the active pairs' g and u can be kept (saved_activations.cuh): 2 T I numbers, 361 MB in bf16 at
// T 8192, I 11008, of which active pairs alone are touched. Decoding then goes the same way.
//
// Tokens go in passes, so that the workspace stays below 256 MiB; lists of pairs are made per pass.
// Rows beyond a ragged end are zeros in shared memory (cp.async without a source); 16-row blocks with
// no pair at all are skipped, dealt to the warps in turn so that all skip alike.
#include <algorithm>

#include "cuda/decode.cuh"
#include "cuda/gemm_down.cuh"
#include "cuda/gemm_ffma.cuh"
#include "cuda/gemm_gate_up.cuh"
#include "cuda/sm90a/forward.h"

namespace dsmoe::cuda {
namespace {

struct Layout {
  int64_t tokens;  // of a pass
  int parts;       // of a unit of `down`
  int64_t expert_columns, row_of_column, arrived, strips, activations;
  ListsLayout lists;
  Carver carver;
};

// Of an SM.
int64_t strip_floats(const ExpertMlpParams& p) {
  if (p.dtype == Dtype::kFloat32) return 0;  // y itself
  return sm90a::is_available() ? sm90a::kStripFloats : kCtasPerSm * DownTile::kStripFloats;
}

// Where units of `down` are few, several CTAs share one: on Hopper up to 128 in all, else 192, nearly a round of any
// data-centre chip. Not the chip's own number, so that the bits are the same on all.
struct Parts {
  int of_unit;
  int64_t strip_floats;  // of all parts
};
Parts parts_of_down(const ExpertMlpParams& p) {
  if (p.dtype == Dtype::kFloat32) return {1, 0};
  const bool on_hopper = sm90a::is_available();
  const int64_t columns = on_hopper ? 64 : DownTile::kTileN, most = on_hopper ? 128 : kMostParts;
  const int64_t units =
      ceil_div<int64_t>(p.num_tokens, kTokensPerChunk) * ceil_div<int64_t>(p.hidden_size, columns);
  // more than 8 would write and read more sums than they read weights
  const int64_t fit = most / std::max<int64_t>(units, 1);
  const int parts = static_cast<int>(std::clamp<int64_t>(fit, 1, settings().parts));
  const int64_t strip = on_hopper ? sm90a::kStripFloats : DownTile::kStripFloats;
  return {parts, parts > 1 ? units * parts * strip : 0};
}

Layout layout(const ExpertMlpParams& p, int ctas) {
  Layout l{};
  const Parts parts = parts_of_down(p);
  l.parts = parts.of_unit;
  const int64_t width = matrix_width(p), row_bytes = width * dtype_size(p.dtype);
  l.expert_columns = l.carver.place((p.num_experts + 1) * 4);
  l.row_of_column = l.carver.place(width * 4);
  l.arrived = l.carver.place(kMostParts * 4);
  l.strips = l.carver.place(std::max(ctas / kCtasPerSm * strip_floats(p), parts.strip_floats) * 4);
  // small tables, and what rounding up takes
  const int64_t room = settings().workspace_bytes - l.carver.bytes - 32 * p.num_experts - 4096;
  l.tokens =
      per_pass<int64_t>(p.num_tokens, kTokensPerChunk, room / (row_bytes + p.num_experts * 5));
  l.lists = place_lists(l.carver, p, l.tokens);
  l.activations = l.carver.place(l.tokens * row_bytes);
  return l;
}

template <class Tile, class T>
void launch_gate_up(const PassArgs<T>& args, int min_size, int max_size, int ctas,
                    cudaStream_t on) {
  gate_up_kernel<T, Tile><<<ctas, kThreads, Tile::kSharedBytes, on>>>(args, min_size, max_size);
}

template <class T>
void launch_mma(const PassArgs<T>& args, int ctas, cudaStream_t on) {
  launch_gate_up<GateUpTile<T, 16, 4>>(args, 1, 16, ctas, on);
  launch_gate_up<GateUpTile<T, 32, 2>>(args, 17, 32, ctas, on);
  launch_gate_up<GateUpTile<T, 64, 2>>(args, 33, INT32_MAX, ctas, on);
  down_kernel<<<ctas, kThreads, DownTile::kSharedBytes, on>>>(args);
}

// The two products of a pass, by the main loop that fits dtype and device.
template <class T>
Status launch_products(const ExpertMlpParams& p, const PassArgs<T>& args, int ctas,
                       cudaStream_t on) {
  if (p.intermediate_size > 0 && p.hidden_size > 0 && sm90a::is_available()) {
    return sm90a::forward(args, ctas / kCtasPerSm, on);
  }
  launch_mma(args, ctas, on);
  return Status::kOk;
}
Status launch_products(const ExpertMlpParams& p, const PassArgs<float>& args, int ctas,
                       cudaStream_t on) {
  if (p.allow_tf32) {
    launch_mma(args, ctas, on);
  } else {
    gate_up_ffma_kernel<<<2 * ctas, kThreads, 0, on>>>(args);  // half the registers
    down_ffma_kernel<<<2 * ctas, kThreads, 0, on>>>(args);
  }
  return Status::kOk;
}

template <class T>
Status forward(const ExpertMlpParams& p, unsigned char* workspace, cudaStream_t on) {
  const int ctas = multiprocessor_count() * kCtasPerSm;
  if (ctas == 0) return failed();
  const Layout l = layout(p, ctas);
  PassArgs<T> args{};
  args.hidden_size = p.hidden_size;
  args.num_experts = p.num_experts;
  args.group_size = settings().group_size;
  args.x_stride = p.x_stride;
  args.gate_proj = weight_rows<const T>(p.gate_proj, p.gate_up, p);
  args.up_proj = weight_rows<const T>(p.up_proj, p.gate_up, p);
  args.logistic = Logistic::of(p.activation);
  args.exact = ExactActivation::of(p.activation);
  args.expert_offsets = p.expert_offsets;
  args.width = matrix_width(p);
  args.expert_columns = reinterpret_cast<int32_t*>(workspace + l.expert_columns);
  args.row_of_column = reinterpret_cast<int32_t*>(workspace + l.row_of_column);
  args.activations = reinterpret_cast<T*>(workspace + l.activations);
  args.intermediate_size = p.intermediate_size;
  args.num_sources = 1;
  args.sources[0] = {args.activations, weight_rows<const T>(p.down_proj_t, p.down, p)};
  args.strips = reinterpret_cast<float*>(workspace + l.strips);
  args.parts = l.tokens >= p.num_tokens ? l.parts : 1;
  args.arrived = reinterpret_cast<unsigned*>(workspace + l.arrived);
  place_columns(args, args.width, on);
  for (int64_t first = 0; first < p.num_tokens; first += l.tokens) {
    args.num_tokens = std::min(p.num_tokens - first, l.tokens);
    args.x = static_cast<const T*>(p.x) + first * p.x_stride;
    args.gates = static_cast<const float*>(p.gates) + first * p.num_experts;
    args.y = static_cast<T*>(p.y) + first * p.hidden_size;
    if (p.activations != nullptr) {
      args.saved = static_cast<T*>(p.activations) + first * 2 * p.intermediate_size;
    }
    const Status status =
        make_lists(p, args.num_tokens, args.gates, l.lists, workspace, on, args.lists);
    if (status != Status::kOk) return status;
    const dim3 clear(ceil_div(ctas, 4), p.num_experts);
    clear_inactive_kernel<<<clear, kThreads, 0, on>>>(args, args.activations);
    const Status launched = launch_products(p, args, ctas, on);
    if (launched != Status::kOk) return launched;
  }
  return launch_status();
}

bool is_decode(const ExpertMlpParams& p) {
  return decodes(p.dtype, p.num_tokens, p.activations != nullptr);
}

}  // namespace

bool reads(const WeightStrides& s, int64_t hidden_size) {
  const bool are_rows = s.hidden == 1 && s.neuron % kChunk == 0 && s.neuron >= hidden_size;
  return are_rows && s.expert % std::max<int64_t>(s.neuron, 1) == 0 && s.expert >= 0;
}

bool writes(const WeightStrides& s, int64_t hidden_size) {
  return s.expert == 0 && s.neuron == hidden_size && s.hidden == 1;
}

int64_t expert_mlp_workspace_bytes(const ExpertMlpParams& p) {
  if (is_decode(p)) return decode_workspace_bytes(p);
  return layout(p, multiprocessor_count() * kCtasPerSm).carver.bytes;
}

Status expert_mlp(const ExpertMlpParams& p, void* workspace, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const bool copies_fit = p.hidden_size % kChunk == 0 && p.x_stride % kChunk == 0 &&
                          aligned_16(p.x) && aligned_16(p.y) && aligned_16(p.gate_proj) &&
                          aligned_16(p.up_proj) && aligned_16(p.down_proj_t) &&
                          reads(p.gate_up, p.hidden_size) &&
                          (is_decode(p) ? decode_reads : reads)(p.down, p.hidden_size);
  if (p.dtype == Dtype::kFloat64 || !copies_fit || p.packed != nullptr ||
      p.num_experts > kMaxExperts) {
    return Status::kUnsupported;
  }
  const bool has_results = p.hidden_size > 0 || p.activations != nullptr;  // then zeros are saved
  if (p.num_tokens == 0 || !has_results) return Status::kOk;
  auto* bytes = static_cast<unsigned char*>(workspace);
  if (p.dtype == Dtype::kFloat32) return forward<float>(p, bytes, on);
  if (is_decode(p)) return decode(p, workspace, stream);
  if (!sm90a::has_wanted_path()) return Status::kNoSuchPath;
  return p.dtype == Dtype::kBFloat16 ? forward<__nv_bfloat16>(p, bytes, on)
                                     : forward<__half>(p, bytes, on);
}

}  // namespace dsmoe::cuda

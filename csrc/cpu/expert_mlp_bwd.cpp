// Sets up the backward's phases (expert_mlp_bwd.h): what is wanted, which pairs, what each thread draws, and memory.
//
// Kept between the phases, per active pair and neuron, in elements of the operand type: g, u unless the forward saved them, and
// dG, dU, h (bf16 dot products: five, rows and row pairs). Per inactive pair with a grad_weight: g, u. Experts go in groups
// that keep this below kGroupBytes whatever T is; with several groups dx is summed in a [T,H] buffer besides.
#include "expert_mlp_bwd.h"

#include "expert_mlp_isa.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {
namespace {

constexpr int64_t kGroupBytes = 192 << 20;
constexpr int64_t kStreamBytes = 8 << 20;  // weight gradients beyond this do not stay in L3 anyway

// What the threads draw, and how much scratch they need; called to count, and again to fill the items.
template <class T>
void plan(Backward<T>& w, int threads) {
  constexpr int64_t kN = kColumns<T>, kPair = Compute<T>::kPair;
  const ExpertMlpParams& p = w.p;
  const int64_t H = p.hidden_size, element = sizeof(T), panels = ceil_div(H, kN);
  w.gate_up_shape = {p.num_tokens,
                     p.num_experts,
                     p.expert_offsets,
                     kLanes<T>,
                     w.steps() * kPair * kN * element,
                     H * int64_t(sizeof(AType<T>)),
                     false,
                     row_unit<T>};
  w.grad_shape = w.gate_up_shape;
  w.grad_shape.width = kN;
  const auto fill = [&](typename Backward<T>::Pass& pass, const RowShape& shape,
                        const Pairs& pairs) {
    pass.count = plan_rows(shape, pairs, threads, pass.items, pass.most_rows);
    w.blocks_size = max_of(w.blocks_size, blocked_size(pass.most_rows, H));
  };
  w.blocks_size = 0;
  if (w.wants_inner || w.wants_weights) {
    if (!p.activations) fill(w.recompute_active, w.gate_up_shape, w.active);
    fill(w.grad_active, w.grad_shape, w.active);
  }
  fill(w.recompute_extra, w.gate_up_shape, w.extra);
  fill(w.grad_extra, w.grad_shape, w.extra);
  if (!w.uses_tiles) w.blocks_size = 0;
  w.chunks = column_chunks<T>(p.num_tokens, H, threads);
  w.weight_pieces =
      threads == 1 ? 1
                   : min_of(panels, ceil_div(int64_t{8} * threads, w.expert_end - w.expert_begin));
  w.sums_size = p.num_tokens * ceil_div(panels, w.chunks) * kN;
  w.scratch_size = max_of(w.steps() * kPair * kN, kScratchBytes / element);
  for (int e = w.expert_begin; e < w.expert_end; ++e) {
    w.scratch_size = max_of(w.scratch_size, 2 * round_up(2 * w.size(e), kPair) * kN);
    if (!w.wants_weights) continue;
    const int64_t rows = round_up(w.active.count(e), kPair);
    w.scratch_size = max_of(w.scratch_size, rows * kN);
    w.weight_steps_size = max_of(w.weight_steps_size, rows * kMaxRows);
  }
}

// Sizes of what is kept between the phases; with starts, also every expert's place in it.
template <class T>
typename Backward<T>::Starts place(const Backward<T>& w, typename Backward<T>::Starts* starts) {
  typename Backward<T>::Starts next = {};
  for (int e = w.expert_begin; e < w.expert_end; ++e) {
    const int64_t S = w.size(e), n = w.active.count(e), m = w.extra.count(e);
    const int64_t panels = ceil_div(S, kColumns<T>);
    if (starts) {
      next.saved = starts[e].saved;
      starts[e] = next;
    }
    if (!w.p.activations) next.inner_active += n * 2 * S;
    next.inner_extra += m * 2 * S;
    const bool blocked = w.in_blocks(e);
    if (!w.kPaired || w.b.dx)
      next.rows += blocked ? blocked_size(n, w.row_terms(e)) : round_up(n, 2) * w.row_stride(S);
    if (w.kPaired && w.wants_weights)
      next.row_pairs += blocked ? 3 * blocked_size(S, n) : ceil_div(n, 2) * w.pair_stride(S);
    if (w.b.dgates) next.shares_active += n * panels, next.shares_extra += m * panels;
  }
  return next;
}

template <class T>
Status backward_group(Backward<T>& w, const Team& team) {
  const int threads = team.max_size;
  const ExpertMlpParams& p = w.p;
  w.recompute_active = w.recompute_extra = w.grad_active = w.grad_extra = {};
  w.uses_vectors = w.uses_tiles = false;
  for (int e = w.expert_begin; e < w.expert_end; ++e)
    for (int kind = 0; kind < 2; ++kind) {
      const int64_t count = (kind ? w.extra : w.active).count(e);
      w.uses_tiles = w.uses_tiles || in_tiles<T>(count);
      w.uses_vectors = w.uses_vectors || (count && !in_tiles<T>(count));
    }
  plan(w, threads);
  const auto sizes = place(w, nullptr);
  const int64_t copy = p.num_tokens * copy_stride<T>(p.hidden_size);
  const bool copies_x = w.uses_vectors && (w.recompute_active.count || w.recompute_extra.count) &&
                        needs_copy<T>(p.hidden_size, p.x_stride, p.num_tokens);
  const bool copies_dy =
      w.uses_vectors && w.wants_inner && needs_copy<T>(p.hidden_size, w.b.dy_stride, p.num_tokens);
  void* memory = allocate([&](Arena& arena) {
    arena.take(w.sync, 1);
    arena.take(w.recompute_active.items, w.recompute_active.count);
    arena.take(w.recompute_extra.items, w.recompute_extra.count);
    arena.take(w.grad_active.items, w.grad_active.count);
    arena.take(w.grad_extra.items, w.grad_extra.count);
    arena.take(w.x_copy, copies_x ? copy : 0);
    arena.take(w.dy_copy, copies_dy ? copy : 0);
    arena.take(w.inner_active, sizes.inner_active);
    arena.take(w.inner_extra, sizes.inner_extra);
    arena.take(w.rows, sizes.rows);
    arena.take(w.row_pairs, sizes.row_pairs);
    arena.take(w.shares_active, sizes.shares_active);
    arena.take(w.shares_extra, sizes.shares_extra);
    arena.take(w.sums, w.sums_size * threads);
    arena.take(w.scratch, w.scratch_size * threads);
    arena.take(w.weight_steps, w.weight_steps_size * threads);
    arena.take(w.blocks, w.blocks_size * threads);
    arena.take(w.turned, w.turns_ddown() ? kTurnedRows * w.kTurnedStride * threads : 0);
  });
  if (!memory) return Status::kWorkspaceTooSmall;
  if (!copies_x) w.x_copy = nullptr;
  if (!copies_dy) w.dy_copy = nullptr;
  *w.sync = {};
  plan(w, threads);
  place(w, w.starts);
  run_team(
      team, threads,
      [](void* arg, int thread, int size) { ((Backward<T>*)arg)->run(thread, size); }, &w);
  workspace_release(memory);
  return Status::kOk;
}

template <class T>
Status backward(const ExpertMlpBackwardParams& b, const Team& team) {
  using C = CType<T>;
  const ExpertMlpParams& p = b.forward;
  if (p.hidden_size == 0) {  // dgates alone has elements: sums of nothing
    if (b.dgates) memset(b.dgates, 0, size_t(p.num_tokens * p.num_experts) * sizeof(C));
    return Status::kOk;
  }
  const C* gates = (const C*)p.gates;
  const C* weights = b.dgates ? (const C*)b.grad_weight : nullptr;
  const auto is_active = [&](int64_t t, int e) { return gates[t * p.num_experts + e] != 0; };
  const auto is_extra = [&](int64_t t, int e) {
    return !is_active(t, e) && weights[t * p.num_experts + e] != 0;
  };
  Backward<T> w{b, p};
  w.wants_weights = b.dgate_proj || b.dup_proj || b.ddown_proj_t;
  w.wants_inner = b.dx || b.dgates || b.dgate_proj || b.dup_proj;

  const int64_t weight_bytes = p.intermediate_size * p.hidden_size * int64_t(sizeof(T));
  void* const weight_outputs[3] = {b.dgate_proj, b.dup_proj, b.ddown_proj_t};
  w.streams_weights = weight_bytes > kStreamBytes && p.hidden_size * int64_t(sizeof(T)) % 64 == 0;
  for (int i = 0; i < 3; ++i) {
    if (!weight_outputs[i]) continue;
    w.streams_weights = w.streams_weights && (uintptr_t)weight_outputs[i] % 64 == 0;
  }

  int64_t *bytes = nullptr, *num_active = nullptr, *num_extra = nullptr;  // [E]
  void* memory = allocate([&](Arena& arena) {
    arena.take(bytes, p.num_experts);
    arena.take(num_active, p.num_experts);
    arena.take(num_extra, p.num_experts);
    arena.take(w.starts, p.num_experts);
  });
  if (!memory) return Status::kWorkspaceTooSmall;
  for (int e = 0; e < p.num_experts; ++e) num_active[e] = num_extra[e] = 0;
  for (int64_t t = 0; t < p.num_tokens; ++t)
    for (int e = 0; e < p.num_experts; ++e) {
      num_active[e] += is_active(t, e);
      if (weights) num_extra[e] += is_extra(t, e);
    }
  int64_t most = 0, total = 0, saved = 0;
  for (int e = 0; e < p.num_experts; ++e) {
    w.starts[e] = {};
    w.starts[e].saved = saved;
    saved += num_active[e] * 2 * w.size(e);
    bytes[e] = (num_active[e] * 7 + num_extra[e] * 2) * w.size(e) * int64_t(sizeof(AType<T>));
    total += bytes[e];
    most = max_of(most, bytes[e]);
  }
  void* dx_memory = nullptr;
  const int64_t limit = max_of(kGroupBytes, most);
  Status status = Status::kOk;
  if (b.dx && total > limit) {
    dx_memory =
        allocate([&](Arena& arena) { arena.take(w.dx_sums, p.num_tokens * p.hidden_size); });
    if (!dx_memory) status = Status::kWorkspaceTooSmall;
  }
  for (int begin = 0; begin < p.num_experts && status == Status::kOk; begin = w.expert_end) {
    int64_t sum = 0;
    int end = begin;
    while (end < p.num_experts && sum + bytes[end] <= limit) sum += bytes[end++];
    w.expert_begin = begin;
    w.expert_end = end;
    w.is_first = begin == 0;
    w.is_last = end == p.num_experts;
    void* lists =
        list_pairs(p.num_tokens, p.num_experts, begin, end, p.expert_offsets, is_active, w.active);
    void* more = list_pairs(
        p.num_tokens, p.num_experts, begin, end, p.expert_offsets,
        [&](int64_t t, int e) { return weights && is_extra(t, e); }, w.extra);
    status = lists && more ? backward_group<T>(w, team) : Status::kWorkspaceTooSmall;
    workspace_release(more);
    workspace_release(lists);
  }
  workspace_release(dx_memory);
  workspace_release(memory);
  return status;
}

}  // namespace

Status expert_mlp_backward(const ExpertMlpBackwardParams& b, const Team& team) {
  switch (b.forward.dtype) {
    case Dtype::kFloat64:
      return backward<double>(b, team);
    case Dtype::kFloat32:
      return backward<float>(b, team);
    case Dtype::kBFloat16:
      return backward<bf16>(b, team);
    case Dtype::kFloat16:
      return backward<fp16>(b, team);
  }
  return Status::kUnsupported;
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

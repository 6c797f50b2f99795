// Sets up the forward's passes (expert_mlp_fwd.h): blocks of tokens, which pairs, what each thread draws, and memory.
#include "expert_mlp_fwd.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {
namespace {

constexpr int64_t kTokenBlock = 768;

// Enough threads that each has some ten microseconds of work: 256 kB of weights or the flops of
// that time.
template <class T>
int64_t useful_threads(const ExpertMlpParams& p, const Pairs& pairs, int max_size) {
  int64_t work = 0;
  for (int e = 0; e < p.num_experts; ++e)
    if (pairs.count(e))
      work += (p.expert_offsets[e + 1] - p.expert_offsets[e]) * (pairs.count(e) + 8);
  work *= 3 * p.hidden_size * int64_t(sizeof(T)) / 8;
  return max_of<int64_t>(1, min_of<int64_t>(max_size, work / (256 << 10)));
}

// Which experts take tokens in order, and where the neurons of each lie. Returns the workspace to release, or null.
template <class T, class F>
void* place_experts(Forward<T>& f, F has) {
  const ExpertMlpParams& p = f.p;
  const bool can_pay = in_tiles<T>(p.num_tokens);
  const int64_t blocks = can_pay && p.activations ? f.num_blocks() : 0;
  void* memory = allocate([&](Arena& arena) {
    arena.take(f.places, p.num_experts);
    arena.take(f.kept, p.num_experts);
    arena.take(f.kept_before, p.num_experts * blocks);
  });
  if (!memory) return nullptr;
  memset(f.kept, 0, size_t(p.num_experts) * sizeof(int32_t));
  for (int64_t t = 0; can_pay && t < p.num_tokens; ++t) {
    if (blocks && t % kBlockRows == 0)
      memcpy(f.kept_before + t / kBlockRows * p.num_experts, f.kept,
             size_t(p.num_experts) * sizeof(int32_t));
    for (int e = 0; e < p.num_experts; ++e) f.kept[e] += has(t, e);
  }
  for (int e = 0; e < p.num_experts; ++e)
    f.places[e].in_order = pays_in_order<T>(f.kept[e], p.num_tokens, f.size(e)) && f.size(e) > 0 &&
                           !(f.has_codes() && f.kept[e] <= kFewRows);
  place_groups<T>(p.num_experts, p.expert_offsets, f.places);
  return memory;
}

template <class T>
Status forward_block(const ExpertMlpParams& p, int64_t* saved_start, const Team& team) {
  Forward<T> f{p};
  f.saved_start = saved_start;
  const CType<T>* gates = (const CType<T>*)p.gates;
  const auto has = [&](int64_t t, int e) { return gates[t * p.num_experts + e] != 0; };
  void* places = place_experts(f, has);
  if (!places) return Status::kWorkspaceTooSmall;
  void* lists = list_pairs(
      p.num_tokens, p.num_experts, 0, p.num_experts, p.expert_offsets,
      [&](int64_t t, int e) { return f.places[e].in_order || has(t, e); }, f.pairs);
  if (!lists) {
    workspace_release(places);
    return Status::kWorkspaceTooSmall;
  }
  const PackedLayout<T> layout{p.hidden_size};
  const bool has_panels = p.packed && !f.has_codes();
  f.threads = useful_threads<T>(p, f.pairs, team.max_size);
  f.shape = {p.num_tokens,
             p.num_experts,
             p.expert_offsets,
             kLanes<T>,
             f.has_codes() ? f.codes().gate_up(0).panel_bytes()
                           : layout.hidden_panel() * int64_t(sizeof(T)),
             p.hidden_size * int64_t(sizeof(AType<T>)),
             p.packed != nullptr,
             row_unit<T>};
  int64_t most_rows = 0;
  f.num_items = plan_rows(f.shape, f.pairs, int(f.threads), nullptr, most_rows);
  f.chunks = column_chunks<T>(p.num_tokens, p.hidden_size, int(f.threads));
  f.sums_size =
      p.num_tokens * ceil_div(ceil_div(p.hidden_size, kColumns<T>), f.chunks) * kColumns<T>;
  f.scratch_size = 0;
  int64_t a_size = 0, most_terms = 0;
  for (int e = 0; e < p.num_experts; ++e) {
    a_size += f.activated_size(e);
    most_terms = max_of(most_terms, f.size(e));
    f.uses_tiles = f.uses_tiles || f.in_blocks(e);
    f.uses_digits = f.uses_digits || (f.pairs.count(e) && f.in_digits(e));
    f.uses_vectors = f.uses_vectors || (f.pairs.count(e) && !f.in_blocks(e) && !f.in_digits(e));
    if (!has_panels) f.scratch_size = max_of(f.scratch_size, 2 * layout.down(f.size(e)).panel());
    if (!f.places[e].in_order) continue;
    ++f.num_parts;
    f.scratch_size = max_of(f.scratch_size, OrderedColumns<T>::scratch_size(f.places[e].terms));
  }
  if (!has_panels)
    f.scratch_size =
        max_of(max_of(f.scratch_size, layout.hidden_panel()), kScratchBytes / int64_t(sizeof(T)));
  if (f.uses_tiles) f.blocks_size = blocked_size(most_rows, p.hidden_size);
  if (f.uses_digits) {
    const int64_t width = f.codes().gate_up(0).block_terms();
    f.x_digits = {p.hidden_size, width};
    f.a_digits = {most_terms, width};
  }
  void* memory = allocate([&](Arena& arena) {
    arena.take(f.sync, 1);
    arena.take(f.items, f.num_items);
    arena.take(f.a_start, p.num_experts);
    arena.take(f.parts, f.num_parts);
    arena.take(f.packed_start, p.num_experts);
    arena.take(f.x_copy, f.copies_x() ? p.num_tokens * f.x_stride() : 0);
    arena.take(f.activated, a_size);
    arena.take(f.sums, f.sums_size * f.threads);
    arena.take(f.scratch, f.scratch_size * f.threads);
    arena.take(f.blocks, f.blocks_size * f.threads);
    if (!f.uses_digits) return;
    arena.take(f.x_digits.digits, p.num_tokens * f.x_digits.stride());
    arena.take(f.x_digits.block, p.num_tokens * f.x_digits.blocks());
    arena.take(f.a_digits.digits, kFewRows * f.threads * f.a_digits.stride());
    arena.take(f.a_digits.block, kFewRows * f.threads * f.a_digits.blocks());
  });
  if (!memory) {
    workspace_release(lists);
    workspace_release(places);
    return Status::kWorkspaceTooSmall;
  }
  *f.sync = {};
  plan_rows(f.shape, f.pairs, int(f.threads), f.items, most_rows);
  int64_t a_next = 0, packed_next = f.has_codes() ? f.codes().column_scales_bytes() : 0;
  for (int e = 0; e < p.num_experts; ++e) {
    f.a_start[e] = a_next;
    f.packed_start[e] = packed_next;
    a_next += f.activated_size(e);
    packed_next += f.has_codes() ? f.codes().expert(f.size(e)) : layout.expert(f.size(e));
  }
  Part<T>* next_part = f.parts;
  for (int e = 0; e < p.num_experts; ++e)
    if (f.places[e].in_order) *next_part++ = f.part(e);
  run_team(
      team, int(f.threads),
      [](void* arg, int thread, int size) { ((Forward<T>*)arg)->run(thread, size); }, &f);
  if (p.activations)
    for (int e = 0; e < p.num_experts; ++e)
      saved_start[e] += (f.places[e].in_order ? f.kept[e] : f.pairs.count(e)) * 2 * f.size(e);
  workspace_release(memory);
  workspace_release(lists);
  workspace_release(places);
  return Status::kOk;
}

template <class T>
Status forward(const ExpertMlpParams& p, const Team& team) {
  if (p.packed && p.packed_format.bits && !kHasCodes<T>) return Status::kUnsupported;
  if (p.num_tokens == 0 || p.hidden_size == 0) return Status::kOk;
  int64_t* saved_start = nullptr;
  void* memory = allocate([&](Arena& arena) { arena.take(saved_start, p.num_experts); });
  if (!memory) return Status::kWorkspaceTooSmall;
  const CType<T>* gates = (const CType<T>*)p.gates;
  for (int e = 0; e < p.num_experts; ++e) saved_start[e] = 0;
  if (p.activations)
    for (int64_t t = 0; t < p.num_tokens; ++t)
      for (int e = 0; e < p.num_experts; ++e) saved_start[e] += gates[t * p.num_experts + e] != 0;
  int64_t next = 0;
  for (int e = 0; e < p.num_experts; ++e) {  // expert-major over all tokens, whatever the blocks
    const int64_t kept = saved_start[e] * 2 * (p.expert_offsets[e + 1] - p.expert_offsets[e]);
    saved_start[e] = next;
    next += kept;
  }
  const int64_t blocks = ceil_div(p.num_tokens, kTokenBlock);
  Status status = Status::kOk;
  for (int64_t b = 0; b < blocks && status == Status::kOk; ++b) {
    const int64_t begin = p.num_tokens * b / blocks;
    ExpertMlpParams block = p;
    block.num_tokens = p.num_tokens * (b + 1) / blocks - begin;
    block.x = (const T*)p.x + begin * p.x_stride;
    block.gates = gates + begin * p.num_experts;
    block.y = (T*)p.y + begin * p.hidden_size;
    status = forward_block<T>(block, saved_start, team);
  }
  workspace_release(memory);
  return status;
}

}  // namespace

Status expert_mlp_forward(const ExpertMlpParams& p, const Team& team) {
  switch (p.dtype) {
    case Dtype::kFloat64:
      return forward<double>(p, team);
    case Dtype::kFloat32:
      return forward<float>(p, team);
    case Dtype::kBFloat16:
      return forward<bf16>(p, team);
    case Dtype::kFloat16:
      return forward<fp16>(p, team);
  }
  return Status::kUnsupported;
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

// expert_mlp forward:  y_t = sum_e gates[t,e] * (silu(x_t Wg_e) * (x_t Wu_e)) Wd_e (kernels.h)
//
//   row pass      g, u = x Wg, x Wu   [n_e, S_e]   one panel holds 16 gate and 16 up columns, so
//                                                  a = gate silu(g) u is formed from one tile's
//                                                  sums and stored as the next GEMM's operand
//   column pass   y += a Wd           [T, H]       experts in ascending order inside a chunk of
//                                                  columns
//
// One parallel region with one barrier. Tokens are gathered by pointer in the tile loop; nothing of
// size [A,H] exists. Large batches go in blocks of tokens, so that a [T, I] stays in the
// third-level cache. One token takes the same path: its tiles are one row high and stream each
// active expert's weights once.
#include "column_pass.h"
#include "expert_mlp_isa.h"
#include "row_pass.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {
namespace {

constexpr int64_t kTokenBlock = 768;

template <class T>
struct Forward {
  using C = CType<T>;
  using A = AType<T>;

  const ExpertMlpParams& p;
  Pairs pairs = {};
  RowShape shape = {};
  RowItem* items = nullptr;
  int64_t num_items = 0, chunks = 0, threads = 1;
  struct Sync {
    Barrier barrier;
    alignas(64) int64_t next_item;
    alignas(64) int64_t next_chunk;
  }* sync = nullptr;
  bool uses_vectors = false, uses_tiles = false;  // by any expert
  A* x_copy = nullptr;              // [T, H padded]   only if vectors cannot read x in place
  A* activated = nullptr;           // per expert [n_e, S padded], or blocks of tiles
  int64_t* a_start = nullptr;       // [E]     of each expert in activated
  int64_t* packed_start = nullptr;  // [E]     of each expert in p.packed
  int64_t* saved_start = nullptr;   // [E]     of each expert's next pair in p.activations
  C* sums = nullptr;                // per thread [T, columns of a chunk]
  T* scratch = nullptr;             // per thread
  T* blocks = nullptr;              // per thread: gathered rows of x
  int64_t sums_size = 0, scratch_size = 0, blocks_size = 0;

  static int64_t padded_size(int64_t size) { return unaliased<A>(round_up(size, kLanes<T>)); }
  int64_t size(int e) const { return p.expert_offsets[e + 1] - p.expert_offsets[e]; }
  bool copies_x() const {
    return uses_vectors && needs_copy<T>(p.hidden_size, p.x_stride, p.num_tokens);
  }
  bool in_blocks(int e) const { return in_tiles<T>(pairs.count(e)); }
  int64_t activated_size(int e) const {
    return in_blocks(e) ? blocked_size(pairs.count(e), size(e))
                        : pairs.count(e) * padded_size(size(e));
  }
  const A* x() const { return copies_x() ? x_copy : (const A*)p.x; }
  int64_t x_stride() const { return copies_x() ? copy_stride<T>(p.hidden_size) : p.x_stride; }
  const T* packed_expert(int e) const {
    return p.packed ? (const T*)p.packed + packed_start[e] : nullptr;
  }

  GatheredRows<T> gather(int e, int64_t low, int64_t high, T* thread_blocks) const {
    return RowMatrix<T>{(const T*)p.x, p.x_stride, p.hidden_size, x(), x_stride()}.gather(
        pairs.of(e), pairs.count(e), low, high, thread_blocks);
  }
  void gate_up(const RowItem& item, T* thread_blocks) {
    for_each_expert(
        item, shape, pairs,
        [&](int e, int64_t begin, int64_t end, int64_t low, int64_t high, bool goes_on) {
          const PackedPanels<T> b = PackedLayout<T>{p.hidden_size}.gate_up(size(e));
          if (high - low <= kMaxRows && !in_blocks(e))
            return gate_up_few(e, b, begin, end, low, int(high - low));
          const GatheredRows<T> rows = gather(e, low, high, thread_blocks);
          for (int64_t panel = begin; panel < end; ++panel)
            gate_up_panel(e, panel, rows, packed_panel(packed_expert(e), b, panel),
                          panel + 1 < end ? ahead_in_packed(packed_expert(e), b, panel + 1)
                          : goes_on       ? first_panel_after(item, e)
                                          : Ahead{});
        });
  }
  // Of the item's next expert: behind an expert's last panel lie its weights for the other pass.
  Ahead first_panel_after(const RowItem& item, int e) const {
    for (++e; e < item.expert_end; ++e)
      if (pairs.count(e))
        return ahead_in_packed(packed_expert(e), PackedLayout<T>{p.hidden_size}.gate_up(size(e)),
                               0);
    return {};
  }
  void gate_up_few(int e, const PackedPanels<T>& b, int64_t begin, int64_t end, int64_t low,
                   int rows) {
    few_rows(x(), x_stride(), pairs.of(e) + low, rows, packed_expert(e), b, begin, end,
             [&](int64_t panel, const C* sums, int64_t stride) {
               swiglu(e, panel, low, rows, sums, stride);
             });
  }
  void gate_up_unpacked(const RowItem& item, T* panel_scratch, T* thread_blocks) {
    const int64_t H = p.hidden_size;
    const auto gather_rows = [&](int e, int64_t low, int64_t high) {
      return gather(e, low, high, thread_blocks);
    };
    for_each_panel(
        item, shape, pairs, gather_rows, [&](int e, int64_t panel, const GatheredRows<T>& rows) {
          const int64_t row = p.expert_offsets[e] + panel * kLanes<T>,
                        valid = size(e) - panel * kLanes<T>;
          const T *gate = (const T*)p.gate_proj + row * H, *up = (const T*)p.up_proj + row * H;
          pack_rows(gate, valid, up, valid, H, H, panel_scratch);
          gate_up_panel(e, panel, rows, PanelOfB<T>{panel_scratch, ceil_div(H, Compute<T>::kPair)},
                        ahead_in_rows(gate, up, min_of<int64_t>(valid, kLanes<T>), H));
        });
  }
  void gate_up_panel(int e, int64_t panel, const GatheredRows<T>& a, const PanelOfB<T>& b,
                     Ahead ahead) {
    row_panel(a, b, ahead, [&](int64_t first, int rows, const C(*sums)[kColumns<T>]) {
      swiglu(e, panel, first, rows, sums[0], kColumns<T>);
    });
  }

  // a = gate silu(g) u, and g, u themselves if the backward will want them. Pointers and strides are read
  // once: as far as the compiler knows a store may change any member.
  void swiglu(int e, int64_t panel, int64_t first, int rows, const C* sums, int64_t sums_stride) {
    const int64_t S = size(e), E = p.num_experts,
                  stride = in_blocks(e) ? kTileTerms : padded_size(S);
    const int64_t column = panel * kLanes<T>, valid = S - column;
    const C* gates = (const C*)p.gates + e;
    const int32_t* tokens = pairs.of(e) + first;
    A* a = activated + a_start[e] +
           (in_blocks(e) ? blocked_at(first, column, S) : first * stride + column);
    // the other half of the last tile of an odd number of panels
    const bool pads = in_blocks(e) && valid <= kLanes<T> && column % kTileTerms == 0;
    T* saved =
        p.activations ? (T*)p.activations + saved_start[e] + first * 2 * S + column : nullptr;
    for (int r = 0; r < rows; ++r, sums += sums_stride, a += stride) {
      const Vec<C> g = load(sums), u = load(sums + kLanes<T>);
      // of an infinite gate NaN would be left in the padding
      store(a, first_lanes<C>(g * sigmoid(g) * u * splat(gates[int64_t(tokens[r]) * E]), valid));
      if (pads) store(a + kLanes<T>, Vec<C>{});
      if (!saved) continue;
      store_kept(saved, g, valid);
      store_kept(saved + S, u, valid);
      saved += 2 * S;
    }
  }

  void down(int64_t chunk, C* chunk_sums, T* thread_scratch) {
    const PackedLayout<T> layout{p.hidden_size};
    const int64_t panels = ceil_div(p.hidden_size, kColumns<T>), begin = panels * chunk / chunks,
                  end = panels * (chunk + 1) / chunks;
    memset(chunk_sums, 0, size_t(p.num_tokens * (end - begin) * kColumns<T>) * sizeof(C));
    UnpackedColumns<T> unpacked(p.hidden_size, begin, end, chunk_sums, thread_scratch,
                                scratch_size);
    for (int e = 0; e < p.num_experts; ++e) {
      if (pairs.count(e) == 0) continue;
      Section<T> section;
      section.tokens = pairs.of(e);
      section.n = pairs.count(e);
      section.a = activated + a_start[e];
      section.in_blocks = in_blocks(e);
      section.a_stride = in_blocks(e) ? block_size(size(e)) : padded_size(size(e));
      section.k = size(e);
      if (p.packed) {
        add_packed(section, packed_expert(e) + layout.down_start(size(e)), p.hidden_size, begin,
                   end, chunk_sums);
      } else {
        section.matrix = (const T*)p.down_proj_t + p.expert_offsets[e] * p.hidden_size;
        unpacked.add(section);
      }
    }
    unpacked.finish();
    write_columns(chunk_sums, p.num_tokens, p.hidden_size, begin, end, (T*)p.y);
  }

  void run(int thread, int team_size) {
    C* thread_sums = sums + thread * sums_size;
    T* thread_scratch = scratch + thread * scratch_size;
    T* thread_blocks = blocks + thread * blocks_size;
    const TileState tiles(uses_tiles);
    if (copies_x()) {
      copy_rows((const T*)p.x, p.x_stride, p.hidden_size, p.num_tokens * thread / team_size,
                p.num_tokens * (thread + 1) / team_size, x_copy);
      barrier_wait(sync->barrier, team_size);
    }
    for (int64_t i; (i = draw(sync->next_item)) < num_items;)
      p.packed ? gate_up(items[i], thread_blocks)
               : gate_up_unpacked(items[i], thread_scratch, thread_blocks);
    barrier_wait(sync->barrier, team_size);
    for (int64_t i; (i = draw(sync->next_chunk)) < chunks;) down(i, thread_sums, thread_scratch);
  }
};

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

template <class T>
Status forward_block(const ExpertMlpParams& p, int64_t* saved_start, const Team& team) {
  Forward<T> f{p};
  f.saved_start = saved_start;
  const CType<T>* gates = (const CType<T>*)p.gates;
  void* lists = list_pairs(
      p.num_tokens, p.num_experts, 0, p.num_experts, p.expert_offsets,
      [&](int64_t t, int e) { return gates[t * p.num_experts + e] != 0; }, f.pairs);
  if (!lists) return Status::kWorkspaceTooSmall;
  const PackedLayout<T> layout{p.hidden_size};
  f.threads = useful_threads<T>(p, f.pairs, team.max_size);
  f.shape = {p.num_tokens,
             p.num_experts,
             p.expert_offsets,
             kLanes<T>,
             layout.hidden_panel() * int64_t(sizeof(T)),
             p.hidden_size * int64_t(sizeof(AType<T>)),
             p.packed != nullptr,
             row_unit<T>};
  int64_t most_rows = 0;
  f.num_items = plan_rows(f.shape, f.pairs, int(f.threads), nullptr, most_rows);
  f.chunks = column_chunks<T>(p.num_tokens, p.hidden_size, int(f.threads));
  f.sums_size =
      p.num_tokens * ceil_div(ceil_div(p.hidden_size, kColumns<T>), f.chunks) * kColumns<T>;
  f.scratch_size = 0;
  int64_t a_size = 0;
  for (int e = 0; e < p.num_experts; ++e) {
    a_size += f.activated_size(e);
    f.uses_tiles = f.uses_tiles || f.in_blocks(e);
    f.uses_vectors = f.uses_vectors || (f.pairs.count(e) && !f.in_blocks(e));
    if (!p.packed) f.scratch_size = max_of(f.scratch_size, 2 * layout.down(f.size(e)).panel());
  }
  if (!p.packed)
    f.scratch_size =
        max_of(max_of(f.scratch_size, layout.hidden_panel()), kScratchBytes / int64_t(sizeof(T)));
  if (f.uses_tiles) f.blocks_size = blocked_size(most_rows, p.hidden_size);
  void* memory = allocate([&](Arena& arena) {
    arena.take(f.sync, 1);
    arena.take(f.items, f.num_items);
    arena.take(f.a_start, p.num_experts);
    arena.take(f.packed_start, p.num_experts);
    arena.take(f.x_copy, f.copies_x() ? p.num_tokens * f.x_stride() : 0);
    arena.take(f.activated, a_size);
    arena.take(f.sums, f.sums_size * f.threads);
    arena.take(f.scratch, f.scratch_size * f.threads);
    arena.take(f.blocks, f.blocks_size * f.threads);
  });
  if (!memory) {
    workspace_release(lists);
    return Status::kWorkspaceTooSmall;
  }
  *f.sync = {};
  plan_rows(f.shape, f.pairs, int(f.threads), f.items, most_rows);
  int64_t a_next = 0, packed_next = 0;
  for (int e = 0; e < p.num_experts; ++e) {
    f.a_start[e] = a_next;
    f.packed_start[e] = packed_next;
    a_next += f.activated_size(e);
    packed_next += layout.expert(f.size(e));
  }
  run_team(
      team, int(f.threads),
      [](void* arg, int thread, int size) { ((Forward<T>*)arg)->run(thread, size); }, &f);
  if (p.activations)
    for (int e = 0; e < p.num_experts; ++e) saved_start[e] += f.pairs.count(e) * 2 * f.size(e);
  workspace_release(memory);
  workspace_release(lists);
  return Status::kOk;
}

template <class T>
Status forward(const ExpertMlpParams& p, const Team& team) {
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

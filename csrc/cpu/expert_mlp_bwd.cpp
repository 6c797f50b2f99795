// expert_mlp backward. With g, u = x Wg, x Wu, s = silu(g), a = s u, h = gate a and dA = dy Wd^T,
// per active pair:
//
//   dgates[t,e] = <a, dA>         dU = gate dA s         dG = gate dA u silu'(g)
//   dx += dG Wg^T + dU Wu^T       dWg = dG^T x           dWu = dU^T x           dWd = h^T dy
//
// and dgates alone, times grad_weight, for the inactive pairs that have one (exact and sampled
// straight-through).
//
//   row pass      g, u           only what the forward did not keep, and the inactive pairs
//   row pass      dA -> dG, dU, h, and each panel's share of <a, dA>
//   column pass   dx, experts in ascending order inside a chunk of columns
//   weight pass   dW [S_e, H] = [S_e, n_e] [n_e, H]   K runs over all tokens of the expert: no sums
//   are kept between
//
// Three barriers in one parallel region; nothing of size [A,H] exists. Experts go in groups, so
// that what is kept between the phases stays below kGroupBytes whatever T is; with several groups
// dx is summed in a [T,H] buffer.
#include "expert_mlp_isa.h"
#include "passes.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {
namespace {

constexpr int64_t kScratchBytes = 512 << 10;  // a thread's panels packed on the fly
constexpr int64_t kWeightB = 256 << 10;  // gathered x or dy of the weight pass: a quarter of L2
constexpr int64_t kGroupBytes = 192 << 20;

template <class T>
struct Backward {
  using C = CType<T>;
  using A = AType<T>;
  static constexpr int64_t kL = kLanes<T>, kN = kColumns<T>, kPair = Compute<T>::kPair;
  // vdpbf16ps wants K in pairs: dG, dU, h are stored by rows for dx and once more, rows paired, for
  // the weights.
  static constexpr bool kPaired = kPair == 2 && Compute<T>::kSub == 1;

  const ExpertMlpBackwardParams& b;
  const ExpertMlpParams& p;
  int expert_begin = 0, expert_end = 0;
  bool is_first = true, is_last = true;  // of the groups
  bool wants_weights = false, wants_inner = false;
  Pairs active = {}, extra = {};
  RowShape gate_up_shape = {}, grad_shape = {};
  struct Pass {
    RowItem* items = nullptr;
    int64_t count = 0;
  } recompute_active = {}, recompute_extra = {}, grad_active = {}, grad_extra = {};
  int64_t chunks = 0, weight_pieces = 0;
  struct Sync {
    Barrier barrier;
    struct alignas(64) Counter {
      int64_t next;
    } recompute_active, recompute_extra, grad_active, grad_extra, columns, weights;
  }* sync = nullptr;
  A *x_copy = nullptr, *dy_copy = nullptr;            // [T, H padded]
  T *inner_active = nullptr, *inner_extra = nullptr;  // per expert [n_e, 2 S]: g | u
  A* rows = nullptr;       // per expert [n_e, row_parts * S padded]: dG | dU (| h)
  A* row_pairs = nullptr;  // per expert [n_e / 2, 3 * S padded, 2]: dG | dU | h
  C *shares_active = nullptr,
    *shares_extra = nullptr;  // per expert [n_e, panels]: <a, dA> of a panel's neurons
  C* dx_sums = nullptr;       // [T, H]  only with several groups
  struct Starts {
    int64_t saved, inner_active, inner_extra, rows, row_pairs, shares_active, shares_extra;
  }* starts = nullptr;   // [E]
  C* sums = nullptr;     // per thread
  T* scratch = nullptr;  // per thread
  int64_t sums_size = 0, scratch_size = 0;

  static constexpr int64_t kRowParts = kPaired ? 2 : 3;
  static int64_t padded_size(int64_t size) { return round_up(size, kN); }
  int64_t size(int e) const { return p.expert_offsets[e + 1] - p.expert_offsets[e]; }
  int64_t steps() const { return ceil_div(p.hidden_size, kPair); }
  int64_t copy_stride() const { return round_up(p.hidden_size, kPair); }
  const T* weight(const void* matrix, int e) const {
    return (const T*)matrix + p.expert_offsets[e] * p.hidden_size;
  }
  C gate(int e, int32_t token) const {
    return ((const C*)p.gates)[int64_t(token) * p.num_experts + e];
  }
  const T* inner(int e, bool is_extra, int64_t row) const {
    if (is_extra) return inner_extra + starts[e].inner_extra + row * 2 * size(e);
    if (p.activations) return (const T*)p.activations + starts[e].saved + row * 2 * size(e);
    return inner_active + starts[e].inner_active + row * 2 * size(e);
  }

  // ------------------------------------------------------------------------------------------ g, u
  // where not kept

  void recompute(const RowItem& item, bool is_extra, T* panel) {
    const Pairs& pairs = is_extra ? extra : active;
    const bool copied = needs_copy<T>(p.hidden_size);
    for_each_panel(item, gate_up_shape, pairs, [&](int e, int64_t i, int64_t low, int64_t high) {
      const int64_t row = i * kL, valid = size(e) - row, S = size(e);
      pack_rows(weight(p.gate_proj, e) + row * p.hidden_size, valid,
                weight(p.up_proj, e) + row * p.hidden_size, valid, p.hidden_size, p.hidden_size,
                panel);
      row_panel(copied ? x_copy : (const A*)p.x, copied ? copy_stride() : p.x_stride, pairs.of(e),
                low, high, panel, (const T*)nullptr, steps(),
                [&](int64_t first, int count, const C(*tile_sums)[kColumns<T>]) {
                  for (int r = 0; r < count; ++r) {
                    T* out = const_cast<T*>(inner(e, is_extra, first + r)) + row;
                    store_part(out, load(tile_sums[r]), valid);
                    store_part(out + S, load(tile_sums[r] + kL), valid);
                  }
                });
    });
  }
  static void store_part(T* out, Vec<C> v, int64_t valid) {
    if (valid >= kL) return store(out, v);
    for (int i = 0; i < valid; ++i) narrow(v[i], out[i]);
  }
  static Vec<C> load_part(const T* from, int64_t valid) {
    if (valid >= kL) return load(from);
    Vec<C> v = {};
    for (int i = 0; i < valid; ++i) v[i] = widen(from[i]);
    return v;
  }

  // -------------------------------------------------------------------------------------- dA, and
  // all that needs it

  void grad(const RowItem& item, bool is_extra, T* panel) {
    const Pairs& pairs = is_extra ? extra : active;
    const bool copied = needs_copy<T>(p.hidden_size);
    for_each_panel(item, grad_shape, pairs, [&](int e, int64_t i, int64_t low, int64_t high) {
      const int64_t row = i * kN, valid = size(e) - row;
      const T* down = weight(p.down_proj_t, e) + row * p.hidden_size;
      const auto epilogue = [&](int64_t first, int count, const C(*tile_sums)[kColumns<T>]) {
        inner_grad(e, i, is_extra, first, count, tile_sums);
      };
      if (!wants_inner) {  // only dWd: h needs no dA
        alignas(64) const C zeros[kMaxRows][kColumns<T>] = {};
        return for_each_tile(
            high - low, [&](int64_t begin, int count) { epilogue(low + begin, count, zeros); });
      }
      pack_rows(down, valid, down + kL * p.hidden_size, valid - kL, p.hidden_size, p.hidden_size,
                panel);
      row_panel(copied ? dy_copy : (const A*)b.dy, copied ? copy_stride() : b.dy_stride,
                pairs.of(e), low, high, panel, (const T*)nullptr, steps(), epilogue);
    });
  }

  struct InnerGrad {
    Vec<C> dg = {}, du = {}, h = {};
  };
  InnerGrad inner_grad_row(int e, int64_t panel, int half, bool is_extra, int64_t row,
                           const C* da_row, Vec<C>& share) {
    const int64_t column = panel * kN + half * kL, valid = size(e) - column;
    const T* from = inner(e, is_extra, row) + column;
    const Vec<C> g = load_part(from, valid), u = load_part(from + size(e), valid),
                 da = load(da_row + half * kL);
    const Vec<C> sig = sigmoid(g), silu = g * sig, a = silu * u;
    share += a * da;
    InnerGrad out;
    if (is_extra) return out;
    const Vec<C> gate_v = splat(gate(e, active.of(e)[row])), gated = gate_v * da;
    out.dg = gated * u * sig * (1 + g * (1 - sig));
    out.du = gated * silu;
    out.h = gate_v * a;
    for (int i = int(valid); i < kL; ++i)
      out.dg[i] = out.du[i] = out.h[i] = 0;  // infinite gates left NaN there
    return out;
  }

  void inner_grad(int e, int64_t panel, bool is_extra, int64_t first, int count,
                  const C (*da)[kColumns<T>]) {
    const int64_t S = size(e), padded = padded_size(S), panels = ceil_div(S, kN);
    const bool keeps = !is_extra && (b.dx || wants_weights);
    Vec<C> share[kMaxRows + 1] = {};
    for (int half = 0; half < 2 && panel * kN + half * kL < S; ++half) {
      const int64_t column = panel * kN + half * kL;
      for (int r = 0; r < count; r += 2) {  // first is even: rows r and r + 1 are a pair
        InnerGrad v[2];
        for (int i = 0; i < min_of(2, count - r); ++i)
          v[i] = inner_grad_row(e, panel, half, is_extra, first + r + i, da[r + i], share[r + i]);
        if (!keeps) continue;
        if (kPaired && wants_weights) store_row_pair(e, (first + r) / 2, padded, column, v);
        if (kPaired && !b.dx) continue;
        // Without pairs the rows serve the weights too, in steps of kPair: an odd last row gets a
        // row of zeros after it.
        const int written = kPaired ? min_of(2, count - r) : kPair == 2 ? 2 : min_of(2, count - r);
        for (int i = 0; i < written; ++i) {
          A* out = rows + starts[e].rows + (first + r + i) * kRowParts * padded + column;
          store(out, v[i].dg);
          store(out + padded, v[i].du);
          if (!kPaired) store(out + 2 * padded, v[i].h);
        }
      }
    }
    if (!b.dgates) return;
    for (int r = 0; r < count; ++r) {
      C sum = 0;
      for (int i = 0; i < kL; ++i) sum += share[r][i];
      (is_extra ? shares_extra + starts[e].shares_extra
                : shares_active + starts[e].shares_active)[(first + r) * panels + panel] = sum;
    }
  }
  void store_row_pair(int e, int64_t pair, int64_t padded, int64_t column,
                      const InnerGrad (&v)[2]) {
    if constexpr (kPaired) {
      A* out = row_pairs + starts[e].row_pairs + (pair * 3 * padded + column) * 2;
      store_pair(out, v[0].dg, v[1].dg);
      store_pair(out + padded * 2, v[0].du, v[1].du);
      store_pair(out + padded * 4, v[0].h, v[1].h);
    }
  }

  // -------------------------------------------------------------------------------------------
  // outputs of that

  void write_dgates(int e) {
    const int64_t panels = ceil_div(size(e), kN);
    for (int kind = 0; kind < 2; ++kind) {
      const bool is_extra = kind == 1;
      const Pairs& pairs = is_extra ? extra : active;
      const C* share = is_extra ? shares_extra + starts[e].shares_extra
                                : shares_active + starts[e].shares_active;
      for (int64_t i = 0; i < pairs.count(e); ++i) {
        const int64_t at = int64_t(pairs.of(e)[i]) * p.num_experts + e;
        C sum = 0;
        for (int64_t j = 0; j < panels; ++j) sum += share[i * panels + j];
        ((C*)b.dgates)[at] = is_extra ? sum * ((const C*)b.grad_weight)[at] : sum;
      }
    }
  }

  void dx_chunk(int64_t chunk, C* chunk_sums, T* thread_scratch) {
    const int64_t panels = ceil_div(p.hidden_size, kN), begin = panels * chunk / chunks,
                  end = panels * (chunk + 1) / chunks;
    const int64_t stride = (end - begin) * kN, width = min_of(stride, p.hidden_size - begin * kN);
    if (is_first) memset(chunk_sums, 0, size_t(p.num_tokens * stride) * sizeof(C));
    for (int64_t t = 0; !is_first && t < p.num_tokens; ++t)
      memcpy(chunk_sums + t * stride, dx_sums + t * p.hidden_size + begin * kN,
             size_t(width) * sizeof(C));
    for (int e = expert_begin; e < expert_end; ++e) {
      if (active.count(e) == 0) continue;
      const int64_t padded = padded_size(size(e));
      for (int part = 0; part < 2; ++part) {
        const bool is_up = part == 1;
        Section<T> section;
        section.tokens = active.of(e);
        section.n = active.count(e);
        section.a = rows + starts[e].rows + (is_up ? padded : 0);
        section.a_stride = kRowParts * padded;
        section.k = size(e);
        section.matrix = weight(is_up ? p.up_proj : p.gate_proj, e);
        section.packed = nullptr;
        add_section(section, p.hidden_size, begin, end, chunk_sums, thread_scratch, scratch_size);
      }
    }
    if (is_last)
      return write_columns(chunk_sums, p.num_tokens, p.hidden_size, begin, end, (T*)b.dx);
    for (int64_t t = 0; t < p.num_tokens; ++t)
      memcpy(dx_sums + t * p.hidden_size + begin * kN, chunk_sums + t * stride,
             size_t(width) * sizeof(C));
  }

  // Columns of the three weight gradients of an expert: piece of weight_pieces.
  void weight_columns(int e, int64_t piece, C* thread_sums, T* thread_scratch) {
    const int64_t all = ceil_div(p.hidden_size, kN), begin = all * piece / weight_pieces;
    const int64_t end = all * (piece + 1) / weight_pieces, n = active.count(e),
                  panel = round_up(n, kPair) * kN;
    const int64_t at_once =
        max_of<int64_t>(1, kWeightB / int64_t(sizeof(T)) / max_of<int64_t>(panel, 1));
    const bool has_pairs = n > 0;
    for (int64_t first = begin; first < end; first += at_once) {
      const int64_t panels = min_of(at_once, end - first);
      void* const outputs[3] = {b.dgate_proj, b.dup_proj, b.ddown_proj_t};
      for (int part = 0; part < 3; ++part) {
        if (!outputs[part]) continue;
        if (has_pairs &&
            (part == 2 || part == 0 || !outputs[0])) {  // gate and up share the packed x
          const T* matrix = (const T*)(part == 2 ? b.dy : p.x);
          const int64_t stride = part == 2 ? b.dy_stride : p.x_stride;
          const int32_t* tokens = active.of(e);
          pack_columns([&](int64_t i) { return matrix + tokens[i] * stride; }, n, first * kN,
                       p.hidden_size, panels, thread_scratch);
        }
        weight_part(e, part, first, panels, thread_sums, thread_scratch, (T*)outputs[part]);
      }
    }
  }

  void weight_part(int e, int part, int64_t first, int64_t panels, C* thread_sums, const T* packed,
                   T* out) {
    const int64_t S = size(e), padded = padded_size(S), n = active.count(e), column = first * kN;
    const int64_t width = min_of(panels * kN, p.hidden_size - column);
    out += p.expert_offsets[e] * p.hidden_size + column;
    if (n == 0) {
      for (int64_t i = 0; i < S; ++i) memset(out + i * p.hidden_size, 0, size_t(width) * sizeof(T));
      return;
    }
    TileArgs<T> args;
    args.b = packed;
    args.steps = ceil_div(n, kPair);
    args.panels = panels;
    args.accumulate = false;
    args.lda = kPaired ? 3 * padded * 2 : 3 * padded;
    const A* a = kPaired ? row_pairs + starts[e].row_pairs + part * padded * 2
                         : rows + starts[e].rows + part * padded;
    for_each_tile(S, [&](int64_t i, int count) {
      args.a[0] = a + i * (kPaired ? 2 : 1);
      for (int r = 0; r < count; ++r) args.c[r] = thread_sums + r * panels * kN;
      run_tile<T, kStepMajor>(count, args);
      for (int r = 0; r < count; ++r) {
        const C* from = args.c[r];
        T* to = out + (i + r) * p.hidden_size;
        int64_t j = 0;
        for (; j + kL <= width; j += kL) store(to + j, load(from + j));
        for (; j < width; ++j) narrow(from[j], to[j]);
      }
    });
  }

  void run(int thread, int team_size) {
    C* thread_sums = sums + thread * sums_size;
    T* thread_scratch = scratch + thread * scratch_size;
    const int64_t t0 = p.num_tokens * thread / team_size,
                  t1 = p.num_tokens * (thread + 1) / team_size;
    if (x_copy) copy_rows((const T*)p.x, p.x_stride, p.hidden_size, t0, t1, x_copy);
    if (dy_copy) copy_rows((const T*)b.dy, b.dy_stride, p.hidden_size, t0, t1, dy_copy);
    if (b.dgates && is_first)
      memset((C*)b.dgates + t0 * p.num_experts, 0, size_t((t1 - t0) * p.num_experts) * sizeof(C));
    barrier_wait(sync->barrier, team_size);
    for (int64_t i; (i = draw(sync->recompute_active.next)) < recompute_active.count;)
      recompute(recompute_active.items[i], false, thread_scratch);
    for (int64_t i; (i = draw(sync->recompute_extra.next)) < recompute_extra.count;)
      recompute(recompute_extra.items[i], true, thread_scratch);
    barrier_wait(sync->barrier, team_size);
    for (int64_t i; (i = draw(sync->grad_active.next)) < grad_active.count;)
      grad(grad_active.items[i], false, thread_scratch);
    for (int64_t i; (i = draw(sync->grad_extra.next)) < grad_extra.count;)
      grad(grad_extra.items[i], true, thread_scratch);
    barrier_wait(sync->barrier, team_size);
    if (b.dgates)
      for (int e = expert_begin + thread; e < expert_end; e += team_size) write_dgates(e);
    if (b.dx)
      for (int64_t i; (i = draw(sync->columns.next)) < chunks;)
        dx_chunk(i, thread_sums, thread_scratch);
    if (!wants_weights) return;
    const int64_t items = (expert_end - expert_begin) * weight_pieces;
    for (int64_t i; (i = draw(sync->weights.next)) < items;)
      weight_columns(expert_begin + int(i / weight_pieces), i % weight_pieces, thread_sums,
                     thread_scratch);
  }

  // -------------------------------------------------------------------------------------------------------
  // set-up

  void plan(int threads) {
    const int64_t H = p.hidden_size, element = sizeof(T);
    gate_up_shape = {
        p.num_tokens,           p.num_experts, p.expert_offsets, kL, steps() * kPair * kN * element,
        H * int64_t(sizeof(A)), false};
    grad_shape = gate_up_shape;
    grad_shape.width = kN;
    if (!p.activations && (wants_inner || wants_weights))
      recompute_active.count = plan_rows(gate_up_shape, active, threads, recompute_active.items);
    recompute_extra.count = plan_rows(gate_up_shape, extra, threads, recompute_extra.items);
    if (wants_inner || wants_weights)
      grad_active.count = plan_rows(grad_shape, active, threads, grad_active.items);
    grad_extra.count = plan_rows(grad_shape, extra, threads, grad_extra.items);
    chunks = column_chunks<T>(p.num_tokens, H, threads);
    const int64_t panels = ceil_div(H, kN);
    weight_pieces = threads == 1
                        ? 1
                        : min_of(panels, ceil_div(int64_t{8} * threads, expert_end - expert_begin));
    sums_size = max_of(p.num_tokens * ceil_div(panels, chunks), panels * kMaxRows) * kN;
    scratch_size = max_of(steps() * kPair * kN, kScratchBytes / element);
    for (int e = expert_begin; e < expert_end; ++e) {
      scratch_size = max_of(scratch_size, round_up(size(e), kPair) * kN);
      if (wants_weights) scratch_size = max_of(scratch_size, round_up(active.count(e), kPair) * kN);
    }
  }

  // Sizes of what is kept between the phases, and every expert's place in it.
  Starts place() {
    Starts next = {};
    for (int e = expert_begin; e < expert_end; ++e) {
      const int64_t S = size(e), n = active.count(e), m = extra.count(e), padded = padded_size(S);
      if (starts) {
        next.saved = starts[e].saved;
        starts[e] = next;
      }
      if (!p.activations) next.inner_active += n * 2 * S;
      next.inner_extra += m * 2 * S;
      if (!kPaired || b.dx) next.rows += round_up(n, 2) * kRowParts * padded;
      if (kPaired && wants_weights) next.row_pairs += ceil_div(n, 2) * 3 * padded * 2;
      if (b.dgates)
        next.shares_active += n * ceil_div(S, kN), next.shares_extra += m * ceil_div(S, kN);
    }
    return next;
  }
};

template <class T>
Status backward_group(Backward<T>& w, Status status_if_no_memory, const Team& team) {
  const int threads = team.max_size;
  const ExpertMlpParams& p = w.p;
  const int64_t copied = needs_copy<T>(p.hidden_size) ? p.num_tokens * w.copy_stride() : 0;
  w.plan(threads);
  typename Backward<T>::Starts* const starts = w.starts;
  w.starts = nullptr;
  const auto sizes = w.place();
  w.starts = starts;
  void* memory = allocate([&](Arena& arena) {
    arena.take(w.sync, 1);
    arena.take(w.recompute_active.items, w.recompute_active.count);
    arena.take(w.recompute_extra.items, w.recompute_extra.count);
    arena.take(w.grad_active.items, w.grad_active.count);
    arena.take(w.grad_extra.items, w.grad_extra.count);
    arena.take(w.x_copy, copied);
    arena.take(w.dy_copy, copied);
    arena.take(w.inner_active, sizes.inner_active);
    arena.take(w.inner_extra, sizes.inner_extra);
    arena.take(w.rows, sizes.rows);
    arena.take(w.row_pairs, sizes.row_pairs);
    arena.take(w.shares_active, sizes.shares_active);
    arena.take(w.shares_extra, sizes.shares_extra);
    arena.take(w.sums, w.sums_size * threads);
    arena.take(w.scratch, w.scratch_size * threads);
  });
  if (!memory) return status_if_no_memory;
  if (!copied) w.x_copy = w.dy_copy = nullptr;
  *w.sync = {};
  w.plan(threads);
  w.place();
  run_team(
      team, threads,
      [](void* arg, int thread, int size) { ((Backward<T>*)arg)->run(thread, size); }, &w);
  workspace_release(memory);
  w.recompute_active = w.recompute_extra = w.grad_active = w.grad_extra = {};
  return Status::kOk;
}

template <class T>
Status backward(const ExpertMlpBackwardParams& b, const Team& team) {
  using C = CType<T>;
  const ExpertMlpParams& p = b.forward;
  const C* gates = (const C*)p.gates;
  const C* weights = b.dgates ? (const C*)b.grad_weight : nullptr;
  const auto is_active = [&](int64_t t, int e) { return gates[t * p.num_experts + e] != 0; };
  const auto is_extra = [&](int64_t t, int e) {
    return !is_active(t, e) && weights[t * p.num_experts + e] != 0;
  };
  Backward<T> w{b, p};
  w.wants_weights = b.dgate_proj || b.dup_proj || b.ddown_proj_t;
  w.wants_inner = b.dx || b.dgates || b.dgate_proj || b.dup_proj;

  // What an expert's pairs keep between the phases, in bytes: g, u, and dG, dU, h once or twice.
  int64_t* bytes = nullptr;
  int64_t most = 0, total = 0;
  void* memory = allocate([&](Arena& arena) {
    arena.take(bytes, p.num_experts);
    arena.take(w.starts, p.num_experts);
  });
  if (!memory) return Status::kWorkspaceTooSmall;
  int64_t saved = 0;
  for (int e = 0; e < p.num_experts; ++e) {
    int64_t n = 0, m = 0;
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      n += is_active(t, e);
      m += weights && is_extra(t, e);
    }
    w.starts[e] = {};
    w.starts[e].saved = saved;
    saved += n * 2 * w.size(e);
    bytes[e] = (n * 7 + m * 2) * w.size(e) * int64_t(sizeof(AType<T>));
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
    status = lists && more ? backward_group<T>(w, Status::kWorkspaceTooSmall, team)
                           : Status::kWorkspaceTooSmall;
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

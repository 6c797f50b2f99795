// expert_mlp backward. With g, u = x Wg, x Wu, s = act(g), a = s u, h = gate a and dA = dy Wd^T,
// per active pair:
//
//   dgates[t,e] = <a, dA>         dU = gate dA s         dG = gate dA u act'(g)
//   dx += dG Wg^T + dU Wu^T       dWg = dG^T x           dWu = dU^T x           dWd = h^T dy
//
// and dgates alone, times grad_weight, for the inactive pairs that have one (exact and sampled
// straight-through).
//
//   row pass      g, u           only what the forward did not keep, and the inactive pairs
//   row pass      dA -> dG, dU, h, and each panel's share of <a, dA>
//   column pass   dx, experts in ascending order inside a chunk of columns
//   weight pass   dW [S_e, H] = [S_e, n_e] [n_e, H]   K runs over all of the expert's tokens
//
// Three barriers in one parallel region; nothing of size [A,H] exists. Experts go in groups, so
// that what is kept between the phases stays below kGroupBytes whatever T is; with several groups
// dx is summed in a [T,H] buffer.
#pragma once

#include "activation.h"
#include "column_pass.h"
#include "row_pass.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {
namespace {

constexpr int64_t kWeightB = 256 << 10;  // gathered x or dy of the weight pass: a quarter of L2
// Neurons and panels of a gradient that is transposed on its way out: 128 KiB in fp32.
constexpr int64_t kTurnedRows = 64, kTurnedPanels = 16;
static_assert(kTurnedRows % kBlockRows == 0);

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
  bool streams_weights = false;  // weight gradients go past the caches
  Pairs active = {}, extra = {};
  RowShape gate_up_shape = {}, grad_shape = {};
  struct Pass {
    RowItem* items = nullptr;
    int64_t count = 0, most_rows = 0;
  } recompute_active = {}, recompute_extra = {}, grad_active = {}, grad_extra = {};
  int64_t chunks = 0, weight_pieces = 0;
  struct Sync {
    Barrier barrier;
    struct alignas(64) Counter {
      int64_t next;
    } recompute_active, recompute_extra, grad_active, grad_extra, columns, weights;
  }* sync = nullptr;
  A *x_copy = nullptr, *dy_copy = nullptr;            // [T, H padded]   null: read in place
  T *inner_active = nullptr, *inner_extra = nullptr;  // per expert [n_e, 2 S]: g | u
  // Of experts in tiles (tile_block.h) rows are blocks, and instead of row pairs there are blocks of neurons
  // with K = n_e, [3][S / 32][n_e / 32][2][16][32]: the weight pass multiplies them with gathered x or dy.
  A* rows = nullptr;       // per expert [n_e, row_parts, S padded]: dG | dU (| h)
  A* row_pairs = nullptr;  // per expert [n_e / 2, 3, S padded, 2]: dG | dU | h
  C *shares_active = nullptr,
    *shares_extra = nullptr;  // per expert [n_e, panels]: <a, dA> of a panel's neurons
  C* dx_sums = nullptr;       // [T, H]  only with several groups
  struct Starts {
    int64_t saved, inner_active, inner_extra, rows, row_pairs, shares_active, shares_extra;
  }* starts = nullptr;        // [E]
  C* sums = nullptr;          // per thread
  T* scratch = nullptr;       // per thread
  A* weight_steps = nullptr;  // per thread: one tile's A of the weight pass
  T* blocks = nullptr;        // per thread: gathered rows of x or dy
  T* turned = nullptr;        // per thread: ddown on its way out, if it is wanted transposed
  int64_t sums_size = 0, scratch_size = 0, weight_steps_size = 0, blocks_size = 0;
  bool uses_vectors = false, uses_tiles = false;  // by any expert

  static constexpr int64_t kRowParts = kPaired ? 2 : 3;
  static int64_t padded_size(int64_t size) { return round_up(size, kN); }
  static int64_t row_stride(int64_t size) { return unaliased<A>(kRowParts * padded_size(size)); }
  static int64_t pair_stride(int64_t size) { return unaliased<A>(3 * padded_size(size) * 2); }
  int64_t size(int e) const { return p.expert_offsets[e + 1] - p.expert_offsets[e]; }
  // Where dU begins in a row: right after dG if no register of dG reaches over it.
  int64_t up_start(int e) const { return size(e) % kL == 0 ? size(e) : padded_size(size(e)); }
  bool in_blocks(int e) const { return in_tiles<T>(active.count(e)); }
  // K of a row of dG and dU in blocks.
  int64_t row_terms(int e) const { return 2 * up_start(e); }
  int64_t steps() const { return ceil_div(p.hidden_size, kPair); }
  const T* weight(const void* matrix, const WeightStrides& strides, int e) const {
    return expert_start((const T*)matrix, strides, p.expert_offsets, e);
  }
  static constexpr int64_t kTurnedStride = kTurnedPanels * kN + kL;
  bool turns_ddown() const { return b.ddown_proj_t && b.ddown.hidden != 1; }
  const T* inner(int e, bool is_extra, int64_t row) const {
    if (is_extra) return inner_extra + starts[e].inner_extra + row * 2 * size(e);
    if (p.activations) return (const T*)p.activations + starts[e].saved + row * 2 * size(e);
    return inner_active + starts[e].inner_active + row * 2 * size(e);
  }

  // ------------------------------------------------------------------------------------------ g, u
  // where not kept

  void recompute(const RowItem& item, bool is_extra, T* panel, T* thread_blocks) {
    const Pairs& pairs = is_extra ? extra : active;
    const RowMatrix<T> x = {(const T*)p.x, p.x_stride, p.hidden_size,
                            x_copy ? x_copy : (const A*)p.x,
                            x_copy ? copy_stride<T>(p.hidden_size) : p.x_stride};
    const auto gather = [&](int e, int64_t low, int64_t high) {
      return x.gather(pairs.of(e), pairs.count(e), low, high, thread_blocks);
    };
    for_each_panel(item, gate_up_shape, pairs, gather,
                   [&](int e, int64_t i, const GatheredRows<T>& a) {
                     const int64_t row = i * kL, valid = size(e) - row, S = size(e);
                     const int64_t stride = p.gate_up.neuron;
                     const T *gate = weight(p.gate_proj, p.gate_up, e) + row * stride,
                             *up = weight(p.up_proj, p.gate_up, e) + row * stride;
                     pack_rows(gate, valid, up, valid, stride, p.hidden_size, panel);
                     row_panel<T, kBlockRows>(
                         a, PanelOfB<T>{panel, steps()},
                         ahead_in_rows(gate, up, min_of(valid, kL), stride, p.hidden_size),
                         [&](int64_t first, int count, const C(*tile_sums)[kColumns<T>]) {
                           for (int r = 0; r < count; ++r) {
                             T* out = const_cast<T*>(inner(e, is_extra, first + r)) + row;
                             store_kept(out, load(tile_sums[r]), valid);
                             store_kept(out + S, load(tile_sums[r] + kL), valid);
                           }
                         });
                   });
  }
  static Vec<C> load_part(const T* from, int64_t valid) {
    if (valid >= kL) return load(from);
    T part[kL] = {};
    memcpy(part, from, size_t(valid) * sizeof(T));
    return load(part);
  }

  // -------------------------------------------------------------------------------------- dA, and
  // all that needs it

  void grad(const RowItem& item, bool is_extra, T* panel, T* thread_blocks) {
    const Pairs& pairs = is_extra ? extra : active;
    const RowMatrix<T> dy = {(const T*)b.dy, b.dy_stride, p.hidden_size,
                             dy_copy ? dy_copy : (const A*)b.dy,
                             dy_copy ? copy_stride<T>(p.hidden_size) : b.dy_stride};
    const auto gather = [&](int e, int64_t low, int64_t high) {
      if (!wants_inner) return GatheredRows<T>{low, high, pairs.of(e), nullptr, 0};
      return dy.gather(pairs.of(e), pairs.count(e), low, high, thread_blocks);
    };
    for_each_panel(
        item, grad_shape, pairs, gather, [&](int e, int64_t i, const GatheredRows<T>& a) {
          const int64_t row = i * kN, valid = size(e) - row;
          const T* down = weight(p.down_proj_t, p.down, e) + row * p.down.neuron;
          const auto epilogue = [&](int64_t first, int count, const C(*tile_sums)[kColumns<T>]) {
            with_activation(p.activation, [&](auto activation) {
              inner_grad<activation()>(e, i, is_extra, first, count, tile_sums);
            });
          };
          if (!wants_inner) {  // only dWd: h needs no dA
            alignas(64) const C zeros[kMostRows<T>][kColumns<T>] = {};
            return for_each_tile(
                a.high - a.low, in_tiles<T>(pairs.count(e)),
                [&](int64_t begin, int count) { epilogue(a.low + begin, count, zeros); });
          }
          const int64_t H = p.hidden_size;
          const bool is_wide = valid > kL || a.blocks;
          Ahead ahead;
          if (p.down.hidden == 1) {
            const int64_t stride = p.down.neuron;
            ahead = ahead_in_rows(down, (const T*)nullptr, min_of(valid, kN), stride, H);
            is_wide ? pack_rows(down, valid, down + kL * stride, valid - kL, stride, H, panel)
                    : pack_rows_half<T, 1>(down, stride, int(valid), H, panel);
          } else {
            const auto row_of_b = [&](int64_t h) { return down + h * p.down.hidden; };
            ahead = {{(const char*)(down + kN), H, ceil_div(kN * int64_t(sizeof(T)), 64),
                      p.down.hidden * int64_t(sizeof(T))}};
            is_wide ? pack_columns<2>(row_of_b, H, 0, steps(), 0, valid, 1, panel)
                    : pack_columns<1>(row_of_b, H, 0, steps(), 0, valid, 1, panel);
          }
          is_wide ? row_panel<T, kBlockRows>(a, PanelOfB<T>{panel, steps()}, ahead, epilogue)
                  : row_panel<T, kBlockRows, 1>(a, PanelOfB<T>{panel, steps()}, ahead, epilogue);
        });
  }

  struct InnerGrad {
    Vec<C> dg, du, h;
  };
  // share += a dA. dg, du and h are 0 in lanes from valid on: there an infinite gate leaves NaN.
  template <Activation kActivation>
  DSMOE_INLINE InnerGrad inner_grad_row(Vec<C> g, Vec<C> u, Vec<C> da, C gate, int64_t valid,
                                        Vec<C>& share) {
    const auto [act, slope] = activate<kActivation>(g);
    const Vec<C> a = act * u;
    share += a * da;
    const Vec<C> gate_v = splat(gate), gated = gate_v * da;
    return {first_lanes<C>(gated * u * slope, valid), first_lanes<C>(gated * act, valid),
            first_lanes<C>(gate_v * a, valid)};
  }

  // In halves onto each other: one lane after another is a chain of kL additions.
  DSMOE_INLINE C sum_of_lanes(Vec<C> v) {
    C lanes[kL];
    memcpy(lanes, &v, sizeof v);
#pragma GCC unroll 4
    for (int half = kL / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
  }

  // dG, dU and h of 16 neurons and up to 16 pairs of rows: the rows of a tile whose K are tokens.
  struct PairsOfHalf {
    alignas(64) A pairs[kHasTiles<T> ? 3 * kTileSteps * kL * 2 : 1];
    A* start(int count) {
      if (count < kBlockRows) memset(pairs, 0, sizeof pairs);
      return pairs;
    }
    void transpose(A* out, int64_t part_size) const {
      if constexpr (kHasTiles<T>) {
        for (int part = 0; part < 3; ++part) {
          const uint32_t* from[kTileSteps];
          for (int i = 0; i < kTileSteps; ++i)
            from[i] = (const uint32_t*)(pairs + (part * kTileSteps + i) * 2 * kL);
          transpose_block(from, 0, (uint32_t*)(out + part * part_size), kTileSteps);
        }
      }
    }
  };

  // Pointers and strides are read once: as far as the compiler knows a store may change any member.
  template <Activation kActivation>
  [[gnu::noinline]] void inner_grad(int e, int64_t panel, bool is_extra, int64_t first, int count,
                                    const C (*da)[kColumns<T>]) {
    const int64_t S = size(e), padded = padded_size(S), panels = ceil_div(S, kN), up = up_start(e);
    const bool keeps = !is_extra && (b.dx || wants_weights);
    const bool keeps_rows = keeps && (!kPaired || b.dx),
               keeps_pairs = keeps && kPaired && wants_weights;
    const bool blocked = !is_extra && in_blocks(e);
    const int64_t terms = row_terms(e), n = blocked ? active.count(e) : 0;
    const int64_t stride = blocked ? kTileTerms : row_stride(S), stride_of_pairs = pair_stride(S),
                  E = p.num_experts;
    const C* gates = (const C*)p.gates + e;
    const int32_t* tokens = (is_extra ? extra : active).of(e) + first;
    Vec<C> share[kMostRows<T> + 1] = {};
    for (int half = 0; half < 2; ++half) {
      const int64_t column = panel * kN + half * kL, valid = S - column;
      A *out = nullptr, *out_up = nullptr, *pair_out = nullptr;
      if (keeps_rows) {
        A* const all = rows + starts[e].rows;
        out = all + (blocked ? blocked_at(first, column, terms) : first * stride + column);
        out_up = blocked ? all + blocked_at(first, up + column, terms) : out + up;
      }
      if (valid <= 0) {  // what tiles take for neurons
        for (int r = 0; blocked && keeps_rows && up != S && r < count; ++r) {
          store(out + r * stride, Vec<C>{});
          store(out_up + r * stride, Vec<C>{});
        }
        break;
      }
      const T* from = inner(e, is_extra, first) + column;
      PairsOfHalf pairs_of_half;
      if (keeps_pairs) {
        pair_out = row_pairs + starts[e].row_pairs + first / 2 * stride_of_pairs + column * 2;
        if (blocked) pair_out = pairs_of_half.start(count);
      }
      for (int r = 0; r < count; r += 2) {  // first is even: rows r and r + 1 are a pair
        const auto row = [&](int i) {
          return inner_grad_row<kActivation>(
              load_part(from + i * 2 * S, valid), load_part(from + i * 2 * S + S, valid),
              load(da[i] + half * kL), gates[int64_t(tokens[i]) * E], valid, share[i]);
        };
        const InnerGrad v[2] = {row(r), r + 1 < count ? row(r + 1) : InnerGrad{}};
        if (keeps_pairs) {
          store_row_pair(pair_out, blocked ? kTileSteps * kL : padded, v);
          pair_out += blocked ? 2 * kL : stride_of_pairs;
        }
        if (!keeps_rows) continue;
        // Without pairs the rows serve the weights too, in steps of kPair: an odd last row gets a
        // row of zeros after it. Unrolled, v stays in registers.
        const int written = kPair == 2 && !kPaired ? 2 : min_of(2, count - r);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i, out += stride, out_up += stride) {
          if (i == written) break;
          store(out, v[i].dg);
          store(out_up, v[i].du);
          if (!kPaired) store(out + 2 * padded, v[i].h);
        }
      }
      if (keeps_pairs && blocked)
        pairs_of_half.transpose(row_pairs + starts[e].row_pairs + blocked_at(column, first, n),
                                blocked_size(S, n));
    }
    if (!b.dgates) return;
    C* to = (is_extra ? shares_extra + starts[e].shares_extra
                      : shares_active + starts[e].shares_active) +
            panel;
    for (int r = 0; r < count; ++r) to[(first + r) * panels] = sum_of_lanes(share[r]);
  }
  DSMOE_INLINE void store_row_pair(A* out, int64_t padded, const InnerGrad (&v)[2]) {
    if constexpr (kPaired) {
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
    UnpackedColumns<T> columns(p.hidden_size, begin, end, chunk_sums, thread_scratch, scratch_size);
    for (int e = expert_begin; e < expert_end; ++e) {
      if (active.count(e) == 0) continue;
      Section<T> section;
      section.tokens = active.of(e);
      section.n = active.count(e);
      section.a = rows + starts[e].rows;
      section.in_blocks = in_blocks(e);
      section.a_stride = section.in_blocks ? block_size(row_terms(e)) : row_stride(size(e));
      section.k = size(e);
      section.matrix = weight(p.gate_proj, p.gate_up, e);
      section.row_stride = p.gate_up.neuron;
      const T* up = weight(p.up_proj, p.gate_up, e);
      if (up_start(e) == size(e)) {  // dG and dU lie side by side: one K of twice the length
        section.k *= 2;
        section.more = up;
      }
      columns.add(section);
      if (section.more) continue;
      section.a += section.in_blocks ? block_size(up_start(e)) : up_start(e);
      section.matrix = up;
      columns.add(section);
    }
    columns.finish();
    if (is_last)
      return write_columns(chunk_sums, p.num_tokens, p.hidden_size, begin, end, (T*)b.dx);
    for (int64_t t = 0; t < p.num_tokens; ++t)
      memcpy(dx_sums + t * p.hidden_size + begin * kN, chunk_sums + t * stride,
             size_t(width) * sizeof(C));
  }

  // Columns of the three weight gradients of an expert: piece of weight_pieces.
  void weight_columns(int e, int64_t piece, T* thread_scratch, A* thread_steps, T* thread_turned) {
    const int64_t all = ceil_div(p.hidden_size, kN), begin = all * piece / weight_pieces;
    const int64_t end = all * (piece + 1) / weight_pieces, n = active.count(e),
                  panel = round_up(n, kPair) * kN;
    int64_t at_once = max_of<int64_t>(1, kWeightB / int64_t(sizeof(T)) / max_of<int64_t>(panel, 1));
    if (turns_ddown()) at_once = min_of(at_once, kTurnedPanels);
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
          pack_columns([&](int64_t i) { return matrix + tokens[i] * stride; }, n, 0,
                       ceil_div(n, kPair), first * kN, p.hidden_size, panels, thread_scratch);
        }
        weight_part(e, part, first, panels, thread_scratch, thread_steps, thread_turned,
                    (T*)outputs[part]);
      }
    }
  }

  void weight_part(int e, int part, int64_t first, int64_t panels, const T* packed, A* thread_steps,
                   T* turned, T* out) {
    const WeightStrides& strides = part == 2 ? b.ddown : b.dgate_up;
    const int64_t S = size(e), n = active.count(e), column = first * kN;
    const int64_t width = min_of(panels * kN, p.hidden_size - column);
    out = expert_start(out, strides, p.expert_offsets, e) + column * strides.hidden;
    const bool turns = strides.hidden != 1;
    if (n == 0) {
      const int64_t runs = turns ? width : S, run = turns ? S : width;
      const int64_t apart = turns ? strides.hidden : strides.neuron;
      for (int64_t i = 0; i < runs; ++i) memset(out + i * apart, 0, size_t(run) * sizeof(T));
      return;
    }
    TileArgs<T> args;
    args.b = packed;
    args.steps = ceil_div(n, kPair);
    args.panels = panels;
    args.accumulate = false;
    args.a_copy = thread_steps;
    args.lda = kPaired ? pair_stride(S) : row_stride(S);
    args.out_stride = turns ? kTurnedStride : strides.neuron;
    args.out_width = width;
    args.stream = streams_weights && !turns;
    if (!turns) return weight_rows(e, part, 0, S, panels, out, args);
    for (int64_t i = 0; i < S; i += kTurnedRows) {
      const int64_t end = min_of(i + kTurnedRows, S);
      args.b = packed;
      weight_rows(e, part, i, end, panels, turned, args);
      transpose_rows(turned, kTurnedStride, end - i, width, out + i, strides.hidden);
    }
  }

  // Rows begin to end of a part, which go to out and on.
  void weight_rows(int e, int part, int64_t begin, int64_t end, int64_t panels, T* out,
                   TileArgs<T>& args) {
    const int64_t S = size(e), padded = padded_size(S), n = active.count(e);
    if constexpr (kHasTiles<T>) {
      if (in_blocks(e))
        return weight_blocks(end - begin,
                             row_pairs + starts[e].row_pairs + part * blocked_size(S, n) +
                                 begin / kBlockRows * block_size(n),
                             block_size(n), panels, out, args);
    }
    const int64_t part_start = part == 1 ? up_start(e) : part * padded;
    const A* a = kPaired ? row_pairs + starts[e].row_pairs + part * padded * 2
                         : rows + starts[e].rows + part_start;
    for_each_tile(end - begin, [&](int64_t i, int count) {
      args.a[0] = a + (begin + i) * (kPaired ? 2 : 1);
      args.out = out + i * args.out_stride;
      run_tile<T, kStepMajor>(count, args);
    });
  }

  void weight_blocks(int64_t S, const A* a, int64_t a_block, int64_t panels, T* out,
                     TileArgs<T>& args) {
    const T* packed = args.b;
    for (int64_t panel = 0; panel < panels; ++panel) {
      args.b = packed + panel * args.steps * PackedPanels<T>::kStep;
      for_each_block<1>(args, a, a_block, S, [&](int64_t first, int count, const C(*sums)[kN]) {
        round_rows(sums[0], count, out + first * args.out_stride + panel * kN, args.out_stride,
                   args.out_width - panel * kN, args.stream);
      });
    }
  }

  void run(int thread, int team_size) {
    C* thread_sums = sums + thread * sums_size;
    T* thread_scratch = scratch + thread * scratch_size;
    T* thread_blocks = blocks + thread * blocks_size;
    const TileState tiles(uses_tiles);
    const int64_t t0 = p.num_tokens * thread / team_size,
                  t1 = p.num_tokens * (thread + 1) / team_size;
    if (x_copy) copy_rows((const T*)p.x, p.x_stride, p.hidden_size, t0, t1, x_copy);
    if (dy_copy) copy_rows((const T*)b.dy, b.dy_stride, p.hidden_size, t0, t1, dy_copy);
    if (b.dgates && is_first)
      memset((C*)b.dgates + t0 * p.num_experts, 0, size_t((t1 - t0) * p.num_experts) * sizeof(C));
    barrier_wait(sync->barrier, team_size);
    for (int64_t i; (i = draw(sync->recompute_active.next)) < recompute_active.count;)
      recompute(recompute_active.items[i], false, thread_scratch, thread_blocks);
    for (int64_t i; (i = draw(sync->recompute_extra.next)) < recompute_extra.count;)
      recompute(recompute_extra.items[i], true, thread_scratch, thread_blocks);
    barrier_wait(sync->barrier, team_size);
    for (int64_t i; (i = draw(sync->grad_active.next)) < grad_active.count;)
      grad(grad_active.items[i], false, thread_scratch, thread_blocks);
    for (int64_t i; (i = draw(sync->grad_extra.next)) < grad_extra.count;)
      grad(grad_extra.items[i], true, thread_scratch, thread_blocks);
    barrier_wait(sync->barrier, team_size);
    if (b.dgates)
      for (int e = expert_begin + thread; e < expert_end; e += team_size) write_dgates(e);
    if (b.dx)
      for (int64_t i; (i = draw(sync->columns.next)) < chunks;)
        dx_chunk(i, thread_sums, thread_scratch);
    if (!wants_weights) return;
    const int64_t items = (expert_end - expert_begin) * weight_pieces;
    for (int64_t i; (i = draw(sync->weights.next)) < items;)
      weight_columns(expert_begin + int(i / weight_pieces), i % weight_pieces, thread_scratch,
                     weight_steps + thread * weight_steps_size,
                     turned + thread * kTurnedRows * kTurnedStride);
    stream_fence();
  }
};

}  // namespace
}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

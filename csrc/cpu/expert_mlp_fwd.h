// expert_mlp forward:  y_t = sum_e gates[t,e] * (act(x_t Wg_e) * (x_t Wu_e)) Wd_e (kernels.h)
//
//   row pass      g, u = x Wg, x Wu   [n_e, S_e]   one panel holds 16 gate and 16 up columns, so
//                                                  a = gate act(g) u is formed from one tile's
//                                                  sums and stored as the next GEMM's operand
//   column pass   y += a Wd           [T, H]       experts in ascending order inside a chunk of
//                                                  columns
//
// One parallel region with one barrier. Tokens are gathered by pointer in the tile loop; nothing of
// size [A,H] exists. Large batches go in blocks of tokens, so that a [T, I] stays in the
// third-level cache. One token takes the same path: its tiles are one row high and stream each
// active expert's weights once.
//
// Fine experts that many tokens use come in tiles with all tokens, in their order (token_order.h).
//
// Weights come as panels that pack_weights made (gate_up, add_packed), as they are (gate_up_unpacked,
// UnpackedColumns), or as codes (gate_up_codes), of which few rows are multiplied as digits and many as panels.
#pragma once

#include "activation.h"
#include "column_pass.h"
#include "expert_mlp_isa.h"
#include "row_pass.h"
#include "token_order.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {
namespace {

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
  bool uses_vectors = false, uses_tiles = false, uses_digits = false;  // by any expert
  A* x_copy = nullptr;              // [T, H padded]   only if vectors cannot read x in place
  A* activated = nullptr;           // per expert [n_e, S padded], or blocks of tiles
  Place* places = nullptr;          // [E]     in the rows of activated
  int32_t* kept = nullptr;          // [E]     pairs that use each expert
  Part<T>* parts = nullptr;         // of groups' B: experts in token order, one after another
  int32_t* kept_before = nullptr;   // [blocks of T, E]   pairs before a block
  int64_t* a_start = nullptr;       // [E]     of each group in activated
  int64_t* packed_start = nullptr;  // [E]     of each expert in p.packed: elements, of codes bytes
  int64_t* saved_start = nullptr;   // [E]     of each expert's next pair in p.activations
  C* sums = nullptr;                // per thread [T, columns of a chunk]
  T* scratch = nullptr;             // per thread
  T* blocks = nullptr;              // per thread: gathered rows of x
  DigitRows<T> x_digits = {},
               a_digits = {};  // of all tokens, and per thread of an expert's few rows
  int64_t sums_size = 0, scratch_size = 0, blocks_size = 0, num_parts = 0;

  static int64_t padded_size(int64_t size) { return unaliased<A>(round_up(size, kLanes<T>)); }
  int64_t size(int e) const { return p.expert_offsets[e + 1] - p.expert_offsets[e]; }
  bool copies_x() const {
    return uses_vectors && needs_copy<T>(p.hidden_size, p.x_stride, p.num_tokens);
  }
  bool has_codes() const { return p.packed && p.packed_format.bits; }
  QuantizedLayout codes() const { return {p.hidden_size, p.packed_format}; }
  const char* expert_codes(int e) const { return (const char*)p.packed + packed_start[e]; }
  int code_zero() const { return 1 << (p.packed_format.bits - 1); }
  bool in_digits(int e) const { return has_codes() && pairs.count(e) <= kFewRows; }
  bool in_blocks(int e) const { return !in_digits(e) && in_tiles<T>(pairs.count(e)); }
  int64_t activated_size(int e) const {
    if (places[e].leader != e) return 0;
    return in_blocks(e) ? blocked_size(pairs.count(e), places[e].terms)
                        : pairs.count(e) * padded_size(size(e));
  }
  const A* x() const { return copies_x() ? x_copy : (const A*)p.x; }
  int64_t x_stride() const { return copies_x() ? copy_stride<T>(p.hidden_size) : p.x_stride; }
  const T* packed_expert(int e) const {
    return p.packed ? (const T*)p.packed + packed_start[e] : nullptr;
  }

  // A thread's gathered rows of x, and which tokens they are if those of a run.
  struct Blocks {
    T* at;
    int64_t low = 0, high = 0;
  };
  GatheredRows<T> gather(int e, int64_t low, int64_t high, Blocks& blocks) const {
    const int32_t* tokens = pairs.of(e);
    if constexpr (kHasTiles<T>) {
      if (places[e].in_order && low == blocks.low && high == blocks.high)
        return {low, high, tokens, x(), x_stride(), block_size(p.hidden_size), blocks.at};
      blocks.low = places[e].in_order ? low : 0;
      blocks.high = places[e].in_order ? high : 0;
    }
    return RowMatrix<T>{(const T*)p.x, p.x_stride, p.hidden_size, x(), x_stride()}.gather(
        tokens, pairs.count(e), low, high, blocks.at);
  }
  void gate_up(const RowItem& item, Blocks& thread_blocks) {
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
  // A few rows as digits; for more a panel of codes becomes one of T.
  void gate_up_codes(const RowItem& item, T* panel_scratch, Blocks& thread_blocks) {
    if constexpr (kHasCodes<T>) {
      for_each_expert(
          item, shape, pairs,
          [&](int e, int64_t begin, int64_t end, int64_t low, int64_t high, bool) {
            const QuantizedPanels b = codes().gate_up(size(e));
            const char* panel_codes = expert_codes(e) + begin * b.panel_bytes();
            if (in_digits(e)) {
              alignas(64) C sums[kFewRows * kColumns<T>];
              for (int64_t panel = begin; panel < end; ++panel, panel_codes += b.panel_bytes()) {
                multiply_codes<T>(panel_codes, b, x_digits, pairs.of(e) + low, high - low, sums,
                                  kColumns<T>);
                activate_rows(e, panel, low, int(high - low), sums, kColumns<T>);
              }
              return;
            }
            const GatheredRows<T> rows = gather(e, low, high, thread_blocks);
            for (int64_t panel = begin; panel < end; ++panel, panel_codes += b.panel_bytes()) {
              dequantize(panel_codes, b, 0, b.blocks(), panel_scratch);
              const Lines next = {panel_codes + b.panel_bytes(), panel + 1 < end,
                                  b.panel_bytes() / 64};
              gate_up_panel(e, panel, rows,
                            PanelOfB<T>{panel_scratch, ceil_div(b.terms, Compute<T>::kPair)},
                            {next});
            }
          });
    }
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
               activate_rows(e, panel, low, rows, sums, stride);
             });
  }
  void gate_up_unpacked(const RowItem& item, T* panel_scratch, Blocks& thread_blocks) {
    const int64_t H = p.hidden_size;
    const auto gather_rows = [&](int e, int64_t low, int64_t high) {
      return gather(e, low, high, thread_blocks);
    };
    for_each_panel(
        item, shape, pairs, gather_rows, [&](int e, int64_t panel, const GatheredRows<T>& rows) {
          const int64_t row = panel * kLanes<T>, valid = size(e) - row, stride = p.gate_up.neuron;
          const T* gate = expert_start((const T*)p.gate_proj, p.gate_up, p.expert_offsets, e);
          const T* up = expert_start((const T*)p.up_proj, p.gate_up, p.expert_offsets, e);
          gate += row * stride;
          up += row * stride;
          pack_rows(gate, valid, up, valid, stride, H, panel_scratch);
          gate_up_panel(e, panel, rows, PanelOfB<T>{panel_scratch, ceil_div(H, Compute<T>::kPair)},
                        ahead_in_rows(gate, up, min_of<int64_t>(valid, kLanes<T>), stride, H));
        });
  }
  void gate_up_panel(int e, int64_t panel, const GatheredRows<T>& a, const PanelOfB<T>& b,
                     Ahead ahead) {
    row_panel(a, b, ahead, [&](int64_t first, int rows, const C(*sums)[kColumns<T>]) {
      activate_rows(e, panel, first, rows, sums[0], kColumns<T>);
    });
  }

  void activate_rows(int e, int64_t panel, int64_t first, int rows, const C* sums,
                     int64_t sums_stride) {
    with_activation(p.activation, [&](auto activation) {
      activate_rows_by<activation()>(e, panel, first, rows, sums, sums_stride);
    });
  }
  // a = gate act(g) u, and g, u themselves if the backward will want them. Pointers and strides are read
  // once: as far as the compiler knows a store may change any member.
  template <Activation kActivation>
  [[gnu::noinline]] void activate_rows_by(int e, int64_t panel, int64_t first, int rows,
                                          const C* sums, int64_t sums_stride) {
    const Place place = places[e];
    const int64_t S = size(e), E = p.num_experts,
                  stride = in_blocks(e) ? kTileTerms : padded_size(S);
    const int64_t column = panel * kLanes<T>, valid = S - column, term = place.first_term + column;
    const C* gates = (const C*)p.gates + e;
    const int32_t* tokens = pairs.of(e) + first;
    A* a = activated + a_start[place.leader] +
           (in_blocks(e) ? blocked_at(first, term, place.terms) : first * stride + column);
    // the other half of the last tile of an odd number of panels
    const bool pads = in_blocks(e) && term + kLanes<T> >= place.terms && term % kTileTerms == 0;
    const float* scales = neuron_scales(e, panel);  // of codes
    T* saved = nullptr;
    if (p.activations)
      saved = (T*)p.activations + saved_start[e] + pairs_before(e, first) * 2 * S + column;
    for (int r = 0; r < rows; ++r, sums += sums_stride, a += stride) {
      const C gate = gates[int64_t(tokens[r]) * E];
      Vec<C> g = load(sums), u = load(sums + kLanes<T>), weight = splat(gate);
      if constexpr (kHasCodes<T>) {
        if (scales) {
          g *= load(scales);
          u *= load(scales + kCodeLanes);
        }
      }
      // of an infinite gate NaN would be left in the padding
      Vec<C> value = first_lanes<C>(activate<kActivation>(g).value * u * weight, valid);
      if constexpr (kHasTiles<T>) value = splat(gate) != splat(C(0)) ? value : Vec<C>{};
      store(a, value);
      if (pads) store(a + kLanes<T>, Vec<C>{});
      if (!saved || gate == 0) continue;
      store_kept(saved, g, valid);
      store_kept(saved + S, u, valid);
      saved += 2 * S;
    }
  }

  // Scales of output channels: of a panel's neurons, and of down's columns. Null: groups have them.
  bool has_channel_scales() const { return has_codes() && p.packed_format.group_size == 0; }
  const float* neuron_scales(int e, int64_t panel) const {
    if (!has_channel_scales()) return nullptr;
    return (const float*)(expert_codes(e) + codes().scales_start(size(e))) + panel * 2 * kCodeLanes;
  }
  const C* column_scales() const { return has_channel_scales() ? (const C*)p.packed : nullptr; }

  void down(int64_t chunk, C* chunk_sums, T* thread_scratch, [[maybe_unused]] int thread) {
    const PackedLayout<T> layout{p.hidden_size};
    const int64_t panels = ceil_div(p.hidden_size, kColumns<T>), begin = panels * chunk / chunks,
                  end = panels * (chunk + 1) / chunks;
    memset(chunk_sums, 0, size_t(p.num_tokens * (end - begin) * kColumns<T>) * sizeof(C));
    if constexpr (kHasTiles<T>) {
      for (int e = 0; e < p.num_experts; ++e)
        if (places[e].in_order && places[e].leader == e)
          down_in_order(e, begin, end, chunk_sums, thread_scratch);
    }
    UnpackedColumns<T> unpacked(p.hidden_size, begin, end, chunk_sums, thread_scratch,
                                scratch_size);
    for (int e = 0; e < p.num_experts; ++e) {
      if (pairs.count(e) == 0 || places[e].in_order) continue;
      Section<T> section;
      section.tokens = pairs.of(e);
      section.n = pairs.count(e);
      section.a = activated + a_start[e];
      section.in_blocks = in_blocks(e);
      section.a_stride = in_blocks(e) ? block_size(size(e)) : padded_size(size(e));
      section.k = size(e);
      if constexpr (kHasCodes<T>) {
        if (has_codes()) {
          section.codes = expert_codes(e) + codes().down_start(size(e));
          section.code_panels = codes().down(size(e));
          if (!in_digits(e)) {
            unpacked.add(section);
            continue;
          }
          const DigitRows<T> digits = thread_digits(thread, size(e));
          for (int64_t r = 0; r < section.n; ++r)
            to_digits(section.a + r * section.a_stride, code_zero(), digits, r);
          add_codes(section, digits, begin, end, chunk_sums);
          continue;
        }
      }
      if (p.packed) {
        add_packed(section, packed_expert(e) + layout.down_start(size(e)), p.hidden_size, begin,
                   end, chunk_sums);
      } else {
        section.matrix = expert_start((const T*)p.down_proj_t, p.down, p.expert_offsets, e);
        section.row_stride = p.down.neuron;
        section.column_stride = p.down.hidden;
        unpacked.add(section);
      }
    }
    unpacked.finish();
    write_columns(chunk_sums, p.num_tokens, p.hidden_size, begin, end, (T*)p.y, column_scales());
  }

  // Of an expert's pairs, those of tokens before row `first` of its list.
  int64_t pairs_before(int e, int64_t first) const {
    if (!places[e].in_order) return first;
    const int64_t block = first / kBlockRows;
    int64_t count = kept_before[block * p.num_experts + e];
    for (int64_t t = block * kBlockRows; t < first; ++t)
      count += ((const C*)p.gates)[t * p.num_experts + e] != 0;
    return count;
  }
  int64_t num_blocks() const { return ceil_div(p.num_tokens, kBlockRows); }
  // A group's experts lie side by side in parts, too, in ascending order.
  Part<T> part(int e) const {
    Part<T> part{size(e), places[e].first_term, (const C*)p.gates + e, p.num_experts};
    if (has_codes()) {
      part.codes = expert_codes(e) + codes().down_start(size(e));
      part.code_panels = codes().down(size(e));
    } else if (p.packed) {
      part.packed = packed_expert(e) + PackedLayout<T>{p.hidden_size}.down_start(size(e));
    } else {
      part.matrix = expert_start((const T*)p.down_proj_t, p.down, p.expert_offsets, e);
      part.row_stride = p.down.neuron;
      part.column_stride = p.down.hidden;
    }
    return part;
  }
  void down_in_order(int leader, int64_t panel_begin, int64_t panel_end, C* chunk_sums,
                     T* thread_scratch) {
    int64_t first = 0, count = 0;
    for (int e = 0; e < p.num_experts; ++e) {
      first += places[e].in_order && places[e].leader < leader;
      count += places[e].in_order && places[e].leader == leader;
    }
    const int64_t terms = places[leader].terms;
    const AType<T>* rows = activated + a_start[leader];
    OrderedColumns<T>(rows, p.num_tokens, terms, parts + first, count, p.hidden_size,
                      thread_scratch)
        .add(panel_begin, panel_end, chunk_sums);
  }

  DigitRows<T> thread_digits(int thread, int64_t terms) const {
    DigitRows<T> digits = a_digits;
    digits.digits += thread * kFewRows * a_digits.stride();
    digits.block += thread * kFewRows * a_digits.blocks();
    digits.terms = terms;
    return digits;
  }

  void run(int thread, int team_size) {
    C* thread_sums = sums + thread * sums_size;
    T* thread_scratch = scratch + thread * scratch_size;
    Blocks thread_blocks{blocks + thread * blocks_size};
    const TileState tiles(uses_tiles);
    const int64_t t0 = p.num_tokens * thread / team_size,
                  t1 = p.num_tokens * (thread + 1) / team_size;
    if (copies_x()) copy_rows((const T*)p.x, p.x_stride, p.hidden_size, t0, t1, x_copy);
    if constexpr (kHasCodes<T>) {
      for (int64_t t = t0; uses_digits && t < t1; ++t)
        to_digits((const T*)p.x + t * p.x_stride, code_zero(), x_digits, t);
    }
    if (copies_x() || uses_digits) barrier_wait(sync->barrier, team_size);
    for (int64_t i; (i = draw(sync->next_item)) < num_items;) {
      if (has_codes())
        gate_up_codes(items[i], thread_scratch, thread_blocks);
      else if (p.packed)
        gate_up(items[i], thread_blocks);
      else
        gate_up_unpacked(items[i], thread_scratch, thread_blocks);
    }
    barrier_wait(sync->barrier, team_size);
    for (int64_t i; (i = draw(sync->next_chunk)) < chunks;)
      down(i, thread_sums, thread_scratch, thread);
  }
};

}  // namespace
}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

// The row pass: a panel of neurons times the gathered rows of a block of tokens. See passes.h.
#pragma once

#include "passes.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

struct RowItem {
  int32_t expert_begin, expert_end;  // a group of experts, its panels numbered through
  int64_t panel_begin, panel_end;
  int64_t token_begin, token_end;
};

struct RowShape {
  int64_t num_tokens;
  int num_experts;
  const int32_t* expert_offsets;
  int64_t width;  // neurons per panel
  int64_t panel_bytes;
  int64_t row_bytes;  // of a row of A
  bool is_packed;     // else a panel is packed anew for every item: prefer few, tall items
  int64_t (*unit)(int64_t rows);  // row_unit of the dtype
  int64_t panels(int e) const { return ceil_div(expert_offsets[e + 1] - expert_offsets[e], width); }
};

// Cuts the pass into items for threads to draw; with out == nullptr only counts them. A group of
// experts shares the rows of a token block, which stay in L2, while the group's weights are reread
// from L3 for every block. One large expert is a group of its own, and its block then holds only
// its own tokens. most_rows: no item has more of one expert.
[[maybe_unused]] static int64_t plan_rows(const RowShape& s, const Pairs& pairs, int threads,
                                          RowItem* out, int64_t& most_rows) {
  int64_t items = 0, total_cost = 0;
  for (int e = 0; e < s.num_experts; ++e)
    total_cost += pairs.count(e) ? s.panels(e) * (pairs.count(e) + 4) : 0;
  for (int begin = 0; begin < s.num_experts;) {
    int end = begin;
    int64_t panels = 0, rows = 0, cost = 0, active = 0, most = 0;
    for (; end < s.num_experts; ++end) {
      if (pairs.count(end) == 0) continue;
      if (panels && (panels + s.panels(end)) * s.panel_bytes > kGroupBudget) break;
      panels += s.panels(end);
      rows += pairs.count(end);
      most = max_of(most, pairs.count(end));
      cost += s.panels(end) * (pairs.count(end) + 4);
      ++active;
    }
    if (panels) {
      const double share =
          rows < s.num_tokens ? double(rows) / double(s.num_tokens) : 1;  // of tokens, about
      double block = double(kL2Budget) / double(s.row_bytes) / share;
      if (!s.is_packed) block *= 2;
      const double enough = 2.0 * kMaxRows * double(active) * double(s.num_tokens) / double(rows);
      if (block < enough) block = enough;
      const int64_t blocks = max_of<int64_t>(1, int64_t(double(s.num_tokens) / block + 0.5));
      const int64_t draws = threads * (s.is_packed ? kPackedDraws : kDraws);
      const int64_t wanted =
          threads == 1 ? 1 : ceil_div(cost * draws, max_of<int64_t>(total_cost * blocks, 1));
      const int64_t pieces = min_of(panels, wanted);
      most_rows = max_of(most_rows, min_of(most, ceil_div(s.num_tokens, blocks) + kBlockRows));
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t i = 0; i < pieces; ++i, ++items)
          if (out)
            out[items] = {begin,
                          end,
                          panels * i / pieces,
                          panels * (i + 1) / pieces,
                          s.num_tokens * b / blocks,
                          s.num_tokens * (b + 1) / blocks};
    }
    begin = end;
  }
  return items;
}

// f(expert, first panel, last panel, first row, last row, whether the item goes on behind the expert) for
// the experts of an item.
template <class F>
DSMOE_INLINE void for_each_expert(const RowItem& item, const RowShape& s, const Pairs& pairs, F f) {
  int64_t first = 0;
  for (int e = item.expert_begin; e < item.expert_end && first < item.panel_end; ++e) {
    if (pairs.count(e) == 0) continue;
    const int64_t panels = s.panels(e), begin = max_of(item.panel_begin, first) - first;
    const int64_t end = min_of(item.panel_end, first + panels) - first;
    first += panels;
    if (begin >= end) continue;
    const int64_t unit = s.unit(pairs.count(e));
    const int64_t low = item.token_begin == 0 ? 0 : pairs.position(e, item.token_begin, unit);
    const int64_t high =
        item.token_end == s.num_tokens ? pairs.count(e) : pairs.position(e, item.token_end, unit);
    if (low < high) f(e, begin, end, low, high, first < item.panel_end);
  }
}

// An expert's rows of x or dy in an item.
template <class T>
struct GatheredRows {
  int64_t low, high;
  const int32_t* tokens;  // of row 0
  const AType<T>* a;
  int64_t a_stride;
  int64_t block_size = 0;            // in tiles only
  const AType<T>* blocks = nullptr;  // of row low on; null: rows are read where they lie
};
// f(expert, panel, rows) for the panels of an item; gather(expert, first row, last row) is asked for the rows
// once for all panels.
template <class G, class F>
DSMOE_INLINE void for_each_panel(const RowItem& item, const RowShape& s, const Pairs& pairs,
                                 G gather, F f) {
  for_each_expert(item, s, pairs,
                  [&](int e, int64_t begin, int64_t end, int64_t low, int64_t high, bool) {
                    const auto rows = gather(e, low, high);
                    for (int64_t panel = begin; panel < end; ++panel) f(e, panel, rows);
                  });
}

// A matrix whose rows tiles multiply: x or dy as the caller has it, and as vectors read it (needs_copy).
template <class T>
struct RowMatrix {
  const T* rows;
  int64_t stride, terms;
  const AType<T>* readable;
  int64_t readable_stride;
  GatheredRows<T> gather(const int32_t* tokens, int64_t count, int64_t low, int64_t high,
                         [[maybe_unused]] T* room) const {
    GatheredRows<T> out{low, high, tokens, readable, readable_stride};
    if constexpr (kHasTiles<T>) {
      if (!in_tiles<T>(count)) return out;
      gather_blocks(rows, stride, terms, tokens + low, high - low, room);
      out.blocks = room;
      out.block_size = block_size(terms);
    }
    return out;
  }
};

// One panel: tiles of gathered rows of A times B into a buffer, which epilogue(first row, rows,
// buffer) consumes, kUnit rows or more at a time (tile_block.h).
template <class T, int kUnit = 1, int W = 2, class F>
DSMOE_INLINE void row_panel(const GatheredRows<T>& a, const PanelOfB<T>& b, Ahead ahead,
                            F epilogue) {
  TileArgs<T> args;
  static_cast<PanelOfB<T>&>(args) = b;
  args.accumulate = false;
  spread(ahead, a.high - a.low, 1, args, a.blocks ? kBlockRows : kMaxRows);
  if constexpr (kHasTiles<T>) {
    if (a.blocks)
      return for_each_block<kUnit>(
          args, a.blocks, a.block_size, a.high - a.low,
          [&](int64_t begin, int rows, const CType<T>(*sums)[kColumns<T>]) {
            epilogue(a.low + begin, rows, sums);
          });
  }
  alignas(64) CType<T> buffer[kMaxRows][kColumns<T>];
  for (int r = 0; r < kMaxRows; ++r) args.c[r] = buffer[r];
  for_each_tile(a.high - a.low, [&](int64_t begin, int rows) {
    for (int r = 0; r < rows; ++r) args.a[r] = a.a + a.tokens[a.low + begin + r] * a.a_stride;
    run_tile<T, kRowPointers, W>(rows, args);
    epilogue(a.low + begin, rows, buffer);
  });
}

// One tile's rows times packed panels, block of K by block: see packed_layout.h. epilogue(panel, sums of
// row 0, their stride).
template <class T, class F>
DSMOE_INLINE void few_rows(const AType<T>* a, int64_t a_stride, const int32_t* tokens, int rows,
                           const T* packed, const PackedPanels<T>& b, int64_t begin, int64_t end,
                           F epilogue) {
  constexpr int64_t kAtOnce = 16, kStride = kAtOnce * kColumns<T> + kLanes<T>;
  alignas(64) CType<T> sums[kMaxRows * kStride];
  TileArgs<T> args;
  for (int r = 0; r < rows; ++r) args.c[r] = sums + r * kStride;
  for (int64_t first = begin; first < end; first += kAtOnce) {
    args.panels = min_of(kAtOnce, end - first);
    for (int64_t block = 0; block < b.blocks(); ++block) {
      args.b = packed + b.start(block, first);
      args.steps = b.steps_of(block);
      args.accumulate = block > 0;
      for (int r = 0; r < rows; ++r) args.a[r] = a + tokens[r] * a_stride + b.first_term(block);
      run_tile<T, kRowPointers>(rows, args);
    }
    for (int64_t i = 0; i < args.panels; ++i) epilogue(first + i, sums + i * kColumns<T>, kStride);
  }
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

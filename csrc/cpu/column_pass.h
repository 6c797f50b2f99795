// The column pass: every expert adds to a chunk of columns of Y. See passes.h.
#pragma once

#include "passes.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

// One expert's contribution: n rows of A, K = k, times the k rows of a row-major [k, H] matrix (or
// its packed panels).
template <class T>
struct Section {
  const int32_t* tokens;  // [n]
  int64_t n;
  const AType<T>* a;  // [n, a_stride]
  int64_t a_stride;
  int64_t k;
  const T* matrix;          // [k, H]  row-major, or null
  const T* more = nullptr;  // if set: the second half of these k rows
  const T* packed;          // [H / kColumns] panels, or null
};

// sums += rows of A, from element `term` on, times the B of args. sums: of the first token and of args'
// first column, a token's `stride` from the next one's.
template <class T>
static void add_tiles(const Section<T>& s, int64_t term, CType<T>* sums, int64_t stride,
                      TileArgs<T>& args) {
  for_each_tile(s.n, [&](int64_t first, int rows) {
    for (int r = 0; r < rows; ++r) {
      args.a[r] = s.a + (first + r) * s.a_stride + term;
      args.c[r] = sums + s.tokens[first + r] * stride;
    }
    run_tile<T, kRowPointers>(rows, args);
  });
}

// sums[t][0 .. (panel_end - panel_begin) * kColumns) += section, for the columns of these panels.
template <class T>
static void add_packed(const Section<T>& s, int64_t hidden, int64_t panel_begin, int64_t panel_end,
                       CType<T>* sums) {
  const PackedPanels<T> b = PackedLayout<T>{hidden}.down(s.k);
  const int64_t panels = panel_end - panel_begin, stride = panels * kColumns<T>;
  TileArgs<T> args;
  args.accumulate = true;
  // A few rows, or a small B: all panels per tile, block by block. Otherwise all tiles per panel, which
  // then stays in L2.
  const bool is_small = b.blocks() == 1 && panels * b.panel() * int64_t(sizeof(T)) <= kSmallB;
  if (s.n <= kMaxRows || is_small) {
    args.panels = panels;
    for (int64_t block = 0; block < b.blocks(); ++block) {
      args.b = s.packed + b.start(block, panel_begin);
      args.steps = b.steps_of(block);
      add_tiles(s, b.first_term(block), sums, stride, args);
    }
    return;
  }
  for (int64_t panel = 0; panel < panels; ++panel) {
    static_cast<PanelOfB<T>&>(args) = packed_panel(s.packed, b, panel_begin + panel);
    Ahead ahead = ahead_in_packed(s.packed, b, panel_begin + panel);
    spread(ahead, s.n, 1, args);
    add_tiles(s, 0, sums + panel * kColumns<T>, stride, args);
  }
}
// The same, whatever the matrix.
template <class T>
static void add_section(const Section<T>& s, int64_t hidden, int64_t panel_begin, int64_t panel_end,
                        CType<T>* sums, T* scratch, int64_t scratch_size) {
  if (s.packed) return add_packed(s, hidden, panel_begin, panel_end, sums);
  const int64_t steps = ceil_div(s.k, Compute<T>::kPair),
                panel_size = steps * kColumns<T> * Compute<T>::kPair;
  const int64_t stride = (panel_end - panel_begin) * kColumns<T>;
  const int64_t at_once = max_of<int64_t>(1, scratch_size / panel_size);
  const auto row = [&](int64_t i) {
    return s.more && i >= s.k / 2 ? s.more + (i - s.k / 2) * hidden : s.matrix + i * hidden;
  };
  TileArgs<T> args;
  args.steps = steps;
  args.accumulate = true;
  Ahead ahead = {};
  for (int64_t begin = panel_begin; begin < panel_end; begin += at_once) {
    const int64_t panels = min_of(at_once, panel_end - begin);
    ahead = {};
    pack_columns([&](int64_t i) { return row(i); }, s.k, begin * kColumns<T>, hidden, panels,
                 scratch);
    const int64_t next = (begin + panels) * kColumns<T>;
    if (begin + panels < panel_end)
      ahead = {(const char*)(s.matrix + next), (const char*)(s.more ? s.more + next : nullptr),
               s.more ? s.k / 2 : s.k, panels * kColumns<T> * int64_t(sizeof(T)) / 64,
               hidden * int64_t(sizeof(T))};
    // A few rows, or a small B: all panels per tile. Otherwise all tiles per panel, which then
    // stays in L2.
    const bool all = s.n <= kMaxRows || panels * panel_size * int64_t(sizeof(T)) <= kSmallB;
    args.panels = all ? panels : 1;
    spread(ahead, s.n, panels, args);
    for (int64_t panel = 0; panel < panels; panel += args.panels) {
      args.b = scratch + panel * panel_size;
      add_tiles(s, 0, sums + (begin - panel_begin + panel) * kColumns<T>, stride, args);
    }
  }
}

// Rounds sums to rows of out [T, H].
template <class T>
static void write_columns(const CType<T>* sums, int64_t num_tokens, int64_t hidden,
                          int64_t panel_begin, int64_t panel_end, T* out) {
  const int64_t stride = (panel_end - panel_begin) * kColumns<T>,
                column = panel_begin * kColumns<T>;
  const int64_t width = min_of(stride, hidden - column);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const CType<T>* from = sums + t * stride;
    T* to = out + t * hidden + column;
    int64_t i = 0;
    for (; i + kLanes<T> <= width; i += kLanes<T>) store(to + i, load(from + i));
    for (; i < width; ++i) narrow(from[i], to[i]);
  }
}

// How many chunks to cut the columns into: the sums of all tokens stay in half of L2, and threads
// find several to draw that come out even (18 panels for two threads: six chunks, not eight).
template <class T>
static int64_t column_chunks(int64_t num_tokens, int64_t hidden, int threads) {
  const int64_t panels = ceil_div(hidden, kColumns<T>);
  const int64_t bytes = num_tokens * panels * kColumns<T> * int64_t(sizeof(CType<T>));
  const int64_t least = min_of(panels, max_of<int64_t>(ceil_div(bytes, kL2Budget), threads));
  if (threads == 1) return least;
  int64_t best = least, best_share = panels;
  for (int64_t chunks = least; chunks <= min_of(panels, max_of<int64_t>(least, 4 * threads));
       ++chunks) {
    const int64_t share = ceil_div(chunks, threads) * ceil_div(panels, chunks);  // of the busiest
    if (share <= best_share) best = chunks, best_share = share;
  }
  return best;
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

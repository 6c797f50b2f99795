// The two ways every GEMM of this op walks over the pairs (token, expert):
//
//   row pass      C[n_e, S_e] = A[n_e, H] B_e      x W, dy V^T: experts x token blocks x panels of
//                                                  neurons, all independent
//   column pass   Y[T, H] += A[n_e, S_e] B_e       a V, dx: chunks of columns of Y; inside, every
//                                                  expert in ascending order
//
// A chunk of Y stays in the second-level cache while all experts add to it, so that fine experts do
// not rewrite Y, no two threads touch the same element, and every sum has one order: same bits for
// any number of threads.
#pragma once

#include <type_traits>

#include "gemm_tile.h"
#include "pack.h"
#include "team.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

constexpr int64_t kL2Budget = 512 << 10;  // of about 1 MiB: the rest is for what streams through
constexpr int64_t kGroupBudget =
    4 << 20;  // weights that neighbouring experts reread from the third-level cache
// Items a thread draws in a pass: the last one may leave others waiting. Of packed weights more would
// be shorter streams, which the prefetchers follow badly (16 of them at T = 1 on two threads: 1.5 x).
constexpr int64_t kDraws = 16, kPackedDraws = 4;
constexpr int64_t kSmallB = 32 << 10;  // B that stays in the first-level cache

// Rows that a tile walks along side by side must not lie a multiple of a page apart: all their lines
// would fall into one set of the first-level cache, which has as many ways, and tiles of 12 rows
// took 7 to 10 % longer (Zen 4).
constexpr int64_t kPageBytes = 4096, kCacheWays = 8;
template <class A>
constexpr bool is_aliased(int64_t stride) {
  return stride * int64_t(sizeof(A)) % kPageBytes == 0;
}
template <class A>
constexpr int64_t unaliased(int64_t stride) {
  return is_aliased<A>(stride) ? stride + 64 / int64_t(sizeof(A)) : stride;
}

// Sums the sizes of what a workspace holds, then hands out the pieces, in the same order.
class Arena {
 public:
  template <class V>
  void take(V*& pointer, int64_t count) {
    pointer = base_ ? (V*)(base_ + used_) : nullptr;
    used_ += round_up(count * int64_t(sizeof(V)), 64);
  }
  int64_t used() const { return used_; }
  void start(void* base) {
    base_ = (char*)base;
    used_ = 0;
  }

 private:
  char* base_ = nullptr;
  int64_t used_ = 0;
};

// take_all(arena) is called twice: to measure, and to hand out.
template <class F>
DSMOE_INLINE void* allocate(F take_all) {
  Arena arena;
  take_all(arena);
  void* memory = workspace_acquire(size_t(arena.used()));
  if (!memory) return nullptr;
  arena.start(memory);
  take_all(arena);
  return memory;
}

// g or u of valid neurons, for the backward. In fp16 at most its largest number: of an infinite g or u
// the gradients would be NaN.
template <class T>
DSMOE_INLINE void store_kept(T* out, Vec<CType<T>> v, int64_t valid) {
  if constexpr (std::is_same_v<T, fp16>) {
    const Vec<float> most = splat(65504.f);
    v = v > most ? most : v < -most ? -most : v;
  }
  if (valid >= kLanes<T>) return store(out, v);
  for (int i = 0; i < valid; ++i) narrow(v[i], out[i]);
}

// Expert-major lists of pairs; tokens ascend within an expert.
struct Pairs {
  int64_t* offsets;  // [E+1]
  int32_t* tokens;   // [A]
  int64_t count(int e) const { return offsets[e + 1] - offsets[e]; }
  const int32_t* of(int e) const { return tokens + offsets[e]; }
  // First pair of e whose token is not below token, rounded down to even (bf16 pairs stay
  // together).
  int64_t position(int e, int64_t token) const {
    const int32_t* list = of(e);
    int64_t low = 0, high = count(e);
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (list[middle] < token)
        low = middle + 1;
      else
        high = middle;
    }
    return low & ~int64_t{1};
  }
};

// Lists the pairs that is_pair(t, e) accepts, e from expert_begin to expert_end; experts without
// neurons have none. Returns the workspace to release, or null.
template <class F>
DSMOE_INLINE void* list_pairs(int64_t num_tokens, int num_experts, int expert_begin, int expert_end,
                              const int32_t* expert_offsets, F is_pair, Pairs& pairs) {
  int64_t total = 0;
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int e = expert_begin; e < expert_end; ++e) total += is_pair(t, e);
  void* memory = allocate([&](Arena& arena) {
    arena.take(pairs.offsets, num_experts + 1);
    arena.take(pairs.tokens, total);
  });
  if (!memory) return nullptr;
  int64_t* cursor =
      pairs.offsets + 1;  // counts, then write positions: after the last write they are the offsets
  for (int e = 0; e <= num_experts; ++e) pairs.offsets[e] = 0;
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int e = expert_begin; e < expert_end; ++e) cursor[e] += is_pair(t, e);
  int64_t sum = 0;
  for (int e = 0; e < num_experts; ++e) {
    const int64_t count = expert_offsets[e + 1] > expert_offsets[e] ? cursor[e] : 0;
    cursor[e] = sum;
    sum += count;
  }
  // A branch on every pair would be mispredicted half the time: bits first, then the set ones.
  for (int64_t t = 0; t < num_tokens; ++t)
    for (int first = expert_begin; first < expert_end; first += 64) {
      uint64_t bits = 0;
      for (int e = first; e < min_of(first + 64, expert_end); ++e)
        bits |= uint64_t(is_pair(t, e)) << (e - first);
      for (; bits; bits &= bits - 1) {
        const int e = first + __builtin_ctzll(bits);
        if (expert_offsets[e + 1] > expert_offsets[e]) pairs.tokens[cursor[e]++] = int32_t(t);
      }
    }
  return memory;
}

// -------------------------------------------------------------------------------------------------------
// row pass

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
  int64_t panels(int e) const { return ceil_div(expert_offsets[e + 1] - expert_offsets[e], width); }
};

// Cuts the pass into items for threads to draw; with out == nullptr only counts them. A group of
// experts shares the rows of a token block, which stay in L2, while the group's weights are reread
// from L3 for every block. One large expert is a group of its own, and its block then holds only
// its own tokens.
[[maybe_unused]] static int64_t plan_rows(const RowShape& s, const Pairs& pairs, int threads,
                                          RowItem* out) {
  int64_t items = 0, total_cost = 0;
  for (int e = 0; e < s.num_experts; ++e)
    total_cost += pairs.count(e) ? s.panels(e) * (pairs.count(e) + 4) : 0;
  for (int begin = 0; begin < s.num_experts;) {
    int end = begin;
    int64_t panels = 0, rows = 0, cost = 0, active = 0;
    for (; end < s.num_experts; ++end) {
      if (pairs.count(end) == 0) continue;
      if (panels && (panels + s.panels(end)) * s.panel_bytes > kGroupBudget) break;
      panels += s.panels(end);
      rows += pairs.count(end);
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

// f(expert, panel, first row, last row) for the panels of an item.
template <class F>
DSMOE_INLINE void for_each_panel(const RowItem& item, const RowShape& s, const Pairs& pairs, F f) {
  int64_t first = 0;
  for (int e = item.expert_begin; e < item.expert_end && first < item.panel_end; ++e) {
    if (pairs.count(e) == 0) continue;
    const int64_t panels = s.panels(e), begin = max_of(item.panel_begin, first) - first;
    const int64_t end = min_of(item.panel_end, first + panels) - first;
    first += panels;
    if (begin >= end) continue;
    const int64_t low = item.token_begin == 0 ? 0 : pairs.position(e, item.token_begin);
    const int64_t high =
        item.token_end == s.num_tokens ? pairs.count(e) : pairs.position(e, item.token_end);
    if (low < high)
      for (int64_t panel = begin; panel < end; ++panel) f(e, panel, low, high);
  }
}

// Spreads a prefetch over `panels` panels of tiles of `rows` rows.
template <class T>
DSMOE_INLINE void spread(Ahead& ahead, int64_t rows, int64_t panels, TileArgs<T>& args) {
  const int64_t lines = ahead.rows * ahead.run * (ahead.then ? 2 : 1);
  const int64_t turns = ceil_div(rows, kMaxRows) * panels * ceil_div(args.steps, kRun);
  args.ahead = ahead.at ? &ahead : nullptr;
  args.ahead_lines = ceil_div(lines, max_of<int64_t>(turns, 1));
}
// What follows a packed B. A single tile reads on where it ends, and looks ahead by itself.
template <class T>
DSMOE_INLINE Ahead ahead_in_packed(const T* b, int64_t panel_size, int64_t rows) {
  if (rows <= kMaxRows) return {};
  const int64_t bytes = panel_size * int64_t(sizeof(T));
  return {(const char*)b + bytes, nullptr, 1, bytes / 64, 0};
}
// What follows `rows` rows that were packed on the fly: as many of the same matrices.
template <class T>
DSMOE_INLINE Ahead ahead_in_rows(const T* first, const T* second, int64_t rows, int64_t hidden) {
  const int64_t size = rows * hidden;
  return {(const char*)(first + size), (const char*)(second ? second + size : nullptr), 1,
          size * int64_t(sizeof(T)) / 64, 0};
}

// One panel: tiles of gathered rows of A times B into a buffer, which epilogue(first row, rows,
// buffer) consumes.
template <class T, int W = 2, class F>
DSMOE_INLINE void row_panel(const AType<T>* a, int64_t a_stride, const int32_t* tokens, int64_t low,
                            int64_t high, const T* b, int64_t steps, Ahead ahead, F epilogue) {
  alignas(64) CType<T> buffer[kMaxRows][kColumns<T>];
  TileArgs<T> args;
  args.b = b;
  args.steps = steps;
  args.accumulate = false;
  for (int r = 0; r < kMaxRows; ++r) args.c[r] = buffer[r];
  spread(ahead, high - low, 1, args);
  for_each_tile(high - low, [&](int64_t begin, int rows) {
    for (int r = 0; r < rows; ++r) args.a[r] = a + tokens[low + begin + r] * a_stride;
    run_tile<T, kRowPointers, W>(rows, args);
    epilogue(low + begin, rows, buffer);
  });
}

// ----------------------------------------------------------------------------------------------------
// column pass

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

// sums[t][0 .. (panel_end - panel_begin) * kColumns) += section, for the columns of these panels.
template <class T>
static void add_section(const Section<T>& s, int64_t hidden, int64_t panel_begin, int64_t panel_end,
                        CType<T>* sums, T* scratch, int64_t scratch_size) {
  const int64_t steps = ceil_div(s.k, Compute<T>::kPair),
                panel_size = steps * kColumns<T> * Compute<T>::kPair;
  const int64_t stride = (panel_end - panel_begin) * kColumns<T>;
  const int64_t at_once =
      s.packed ? panel_end - panel_begin : max_of<int64_t>(1, scratch_size / panel_size);
  const auto row = [&](int64_t i) {
    return s.more && i >= s.k / 2 ? s.more + (i - s.k / 2) * hidden : s.matrix + i * hidden;
  };
  TileArgs<T> args;
  args.steps = steps;
  args.accumulate = true;
  Ahead ahead = {};
  for (int64_t begin = panel_begin; begin < panel_end; begin += at_once) {
    const int64_t panels = min_of(at_once, panel_end - begin);
    const T* b = s.packed ? s.packed + begin * panel_size : scratch;
    ahead = {};
    if (!s.packed) {
      pack_columns([&](int64_t i) { return row(i); }, s.k, begin * kColumns<T>, hidden, panels,
                   scratch);
      const int64_t next = (begin + panels) * kColumns<T>;
      if (begin + panels < panel_end)
        ahead = {(const char*)(s.matrix + next), (const char*)(s.more ? s.more + next : nullptr),
                 s.more ? s.k / 2 : s.k, panels * kColumns<T> * int64_t(sizeof(T)) / 64,
                 hidden * int64_t(sizeof(T))};
    }
    // A few rows, or a small B: all panels per tile. Otherwise all tiles per panel, which then
    // stays in L2.
    const bool all = s.n <= kMaxRows || panels * panel_size * int64_t(sizeof(T)) <= kSmallB;
    args.panels = all ? panels : 1;
    if (!s.packed) spread(ahead, s.n, panels, args);
    for (int64_t panel = 0; panel < panels; panel += args.panels) {
      args.b = b + panel * panel_size;
      if (s.packed && !all) {
        ahead = ahead_in_packed(args.b, args.panels * panel_size, s.n);
        spread(ahead, s.n, args.panels, args);
      }
      for_each_tile(s.n, [&](int64_t first, int rows) {
        for (int r = 0; r < rows; ++r) {
          args.a[r] = s.a + (first + r) * s.a_stride;
          args.c[r] =
              sums + s.tokens[first + r] * stride + (begin - panel_begin + panel) * kColumns<T>;
        }
        run_tile<T, kRowPointers>(rows, args);
      });
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

// Rows of x or dy as tiles broadcast them: the rows themselves if they can be read in place, else a
// converted copy.
template <class T>
static bool needs_copy(int64_t hidden, int64_t stride, int64_t num_tokens) {
  return sizeof(AType<T>) != sizeof(T) || hidden % Compute<T>::kPair != 0 ||
         (kMaxRows > kCacheWays && num_tokens > kCacheWays && stride != 0 && is_aliased<T>(stride));
}
template <class T>
static int64_t copy_stride(int64_t hidden) {
  return unaliased<AType<T>>(round_up(hidden, Compute<T>::kPair));
}
template <class T>
static void copy_rows(const T* from, int64_t stride, int64_t hidden, int64_t begin, int64_t end,
                      AType<T>* to) {
  const int64_t padded = copy_stride<T>(hidden);
  for (int64_t t = begin; t < end; ++t) {
    const T* row = from + t * stride;
    AType<T>* out = to + t * padded;
    int64_t i = 0;
    if constexpr (sizeof(AType<T>) == sizeof(T)) {
      memcpy(out, row, size_t(hidden) * sizeof(T));
    } else {
      for (; i + kLanes<T> <= hidden; i += kLanes<T>) store(out + i, load(row + i));
      for (; i < hidden; ++i) out[i] = widen(row[i]);
    }
    for (i = hidden; i < padded; ++i) out[i] = AType<T>{};
  }
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

// The two ways every GEMM of this op walks over the pairs (token, expert):
//
//   row pass      C[n_e, S_e] = A[n_e, H] B_e      x W, dy V^T: experts x token blocks x panels of
//                                                  neurons, all independent (row_pass.h)
//   column pass   Y[T, H] += A[n_e, S_e] B_e       a V, dx: chunks of columns of Y; inside, every
//                                                  expert in ascending order (column_pass.h)
//
// A chunk of Y stays in the second-level cache while all experts add to it, so that fine experts do
// not rewrite Y, no two threads touch the same element, and every sum has one order: same bits for
// any number of threads.
#pragma once

#include <type_traits>

#include "gemm_tile.h"
#include "pack.h"
#include "team.h"
#include "tile_block.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

// Half of L2, which is 2 MiB in cores with AMX, else about 1 MiB: the rest is for panels and what streams
// through.
#ifdef DSMOE_AMX
constexpr int64_t kL2Budget = 1 << 20;
#else
constexpr int64_t kL2Budget = 512 << 10;
#endif
constexpr int64_t kGroupBudget =
    4 << 20;  // weights that neighbouring experts reread from the third-level cache
// Items a thread draws in a pass: the last one may leave others waiting. Of packed weights more would
// be shorter streams, which the prefetchers follow badly (16 of them at T = 1 on two threads: 1.5 x).
constexpr int64_t kDraws = 16, kPackedDraws = 4;

// Rows that a tile walks along side by side must not lie a multiple of a page apart: all their lines
// would fall into one set of the first-level cache, which has as many ways, and tiles of 12 rows
// took 7 to 10 % longer (Zen 4), tiles of 6 rows, whose B and sums want ways too, 3 to 4 % (Zen 3).
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

// The first element of an expert in one of its weight matrices.
template <class T>
DSMOE_INLINE T* expert_start(T* matrix, const WeightStrides& strides, const int32_t* expert_offsets,
                             int e) {
  return matrix + (strides.expert ? e * strides.expert : expert_offsets[e] * strides.neuron);
}

// Expert-major lists of pairs; tokens ascend within an expert.
struct Pairs {
  int64_t* offsets;  // [E+1]
  int32_t* tokens;   // [A]
  int64_t count(int e) const { return offsets[e + 1] - offsets[e]; }
  const int32_t* of(int e) const { return tokens + offsets[e]; }
  // First pair of e whose token is not below token, rounded down to whole units (bf16 pairs, blocks of
  // tiles).
  int64_t position(int e, int64_t token, int64_t unit) const {
    const int32_t* list = of(e);
    int64_t low = 0, high = count(e);
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (list[middle] < token)
        low = middle + 1;
      else
        high = middle;
    }
    return low / unit * unit;
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

// Spreads a prefetch over `panels` panels of tiles of `rows` rows.
template <class T>
DSMOE_INLINE void spread(Ahead& ahead, int64_t rows, int64_t panels, TileArgs<T>& args,
                         int64_t rows_at_once = kMaxRows) {
  const int64_t lines = ahead.now.count() + ahead.then.count();
  const int64_t turns = ceil_div(rows, rows_at_once) * panels * ceil_div(args.steps, kRun);
  args.ahead = lines > 0 ? &ahead : nullptr;
  args.ahead_lines = ceil_div(lines, max_of<int64_t>(turns, 1));
}
// A panel of packed weights: all of its whole blocks.
template <class T>
DSMOE_INLINE Ahead ahead_in_packed(const T* packed, const PackedPanels<T>& b, int64_t panel) {
  constexpr int64_t kBytes = sizeof(T);
  const char* at = (const char*)(packed + b.start(0, panel));
  if (b.whole_blocks() == 0) return {{at, 1, b.steps() * b.kStep * kBytes / 64}};
  return {{at, b.whole_blocks(), b.block_size() * kBytes / 64, b.panels * b.block_size() * kBytes}};
}
// What follows `rows` rows that were packed on the fly: as many of the same matrices.
template <class T>
DSMOE_INLINE Ahead ahead_in_rows(const T* first, const T* second, int64_t rows, int64_t stride,
                                 int64_t hidden) {
  const auto after = [&](const T* matrix) -> Lines {
    const char* at = (const char*)(matrix + rows * stride);
    if (stride == hidden) return {at, 1, rows * hidden * int64_t(sizeof(T)) / 64};
    return {at, rows, ceil_div(hidden * int64_t(sizeof(T)), 64), stride * int64_t(sizeof(T))};
  };
  return {after(first), second ? after(second) : Lines{}};
}

// A panel of packed weights, for tiles that go through all of K.
template <class T>
DSMOE_INLINE PanelOfB<T> packed_panel(const T* packed, const PackedPanels<T>& b, int64_t panel) {
  const int64_t last = b.blocks() - 1;
  if (last == 0) return {packed + b.start(0, panel), b.steps()};
  return {packed + b.start(0, panel), b.steps(), (b.panels - 1) * b.block_size(),
          b.start(last, panel) - b.start(last - 1, panel) - b.block_size()};
}

// Rows of x or dy as tiles broadcast them: the rows themselves if they can be read in place, else a
// converted copy.
template <class T>
static bool needs_copy(int64_t hidden, int64_t stride, int64_t num_tokens) {
  return sizeof(AType<T>) != sizeof(T) || hidden % Compute<T>::kPair != 0 ||
         (num_tokens > kCacheWays && stride != 0 && is_aliased<T>(stride));
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

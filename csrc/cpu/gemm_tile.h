// The one inner loop: C[rows, panels x kColumns] (+)= A[rows, K] B[K, panels x kColumns].
//
// B is packed in panels of two registers (kColumns columns), K steps after one another, kPair rows
// of K interleaved, so that it is one sequential stream whatever the matrix was:
//   B[panel][K / kPair][kColumns][kPair]
// A is broadcast element by element (bf16: pair by pair), so its rows may lie anywhere:
//   kRowPointers   a pointer per row: gathering tokens costs nothing
//   kStepMajor     A[K / kPair][lda][kPair], as weight gradients have it
// Sums stay in registers over the whole of K; 12 x 2 of them hide the latency of two multiply-adds
// per cycle.
#pragma once

#include "amx.h"
#include "packed_layout.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

enum AOrder { kRowPointers, kStepMajor };

// Cache lines: rows of `run` lines, `stride` bytes apart.
struct Lines {
  const char* at = nullptr;
  int64_t rows = 0, run = 0, stride = 0;
  int64_t count() const { return rows * run; }
};
// What to bring into L2 while tiles multiply, TileArgs::ahead_lines of them for every run of steps.
struct Ahead {
  Lines now, then = {};        // rows that are not begun
  const char* next = nullptr;  // in the row that is
  int64_t left = 0;

  DSMOE_INLINE void fetch(Ahead& ahead, int64_t lines) {
    while (lines > 0) {
      if (ahead.left == 0) {
        if (ahead.now.rows == 0) {
          if (ahead.then.rows == 0) return;
          ahead.now = ahead.then;
          ahead.then = {};
        }
        ahead.next = ahead.now.at;
        ahead.left = ahead.now.run;
        ahead.now.at += ahead.now.stride;
        --ahead.now.rows;
      }
      const int64_t count = min_of(lines, ahead.left);
      const char* next = ahead.next;
      ahead.next += 64 * count;
      ahead.left -= count;
      lines -= count;
      for (; next != ahead.next; next += 64) __builtin_prefetch(next, 0, 2);
    }
  }
};

// B, or one panel of it that packed_layout.h has cut into blocks of kBlockSteps: elements from the end of
// one to the next, and to the last.
template <class T>
struct PanelOfB {
  const T* b;
  int64_t steps;  // K / kPair, rounded up
  int64_t skip = 0, last_skip = 0;
};

template <class T>
struct TileArgs : PanelOfB<T> {
  const AType<T>* a[kMaxRows];  // row pointers; kStepMajor: a[0] only
  int64_t lda = 0;  // kStepMajor: elements from one k to the next (one pair of k for vdpbf16ps)
  AType<T>* a_copy = nullptr;  // kStepMajor: room for all steps of kMaxRows rows
  int64_t panels = 1;
  int64_t second = 0;     // W = 4: panels from one to the other that is multiplied at the same time
  CType<T>* c[kMaxRows];  // kRowPointers: rows of sums
  bool accumulate;
  T* out = nullptr;  // kStepMajor: rows of the result, rounded straight from the registers
  int64_t out_stride = 0;
  int64_t out_width = 0;  // columns that exist in out; the last panel may be wider
  bool stream = false;  // past the caches: out is aligned and too large to be read from them again
  // What the caller will read after this B; in B itself tiles look ahead, or leave it to the hardware.
  Ahead* ahead = nullptr;
  int64_t ahead_lines = 0;
};

constexpr int kRun = 16;  // steps between two looks ahead, whose code stays out of the inner loop
static_assert(kBlockSteps % kRun == 0);

// Intel's cores with AVX-512, told by the instruction set that is chosen on them: amx_bf16, or avx512, which on
// AMD's avx512_bf16 comes before.
#if defined(DSMOE_AMX) || (defined(__AVX512F__) && !defined(__AVX512BF16__))
constexpr bool kIsIntel = true;
#else
constexpr bool kIsIntel = false;
#endif

// How far a tile looks ahead in B, in bytes: for L1, and for L2 (AVX2 at T = 64, B in L2: 12 % slower with
// both; Intel: far enough for L1 is far enough).
constexpr int64_t kNear = kIsIntel ? 4096 : 2048,
                  kFar = kVecBytes == 64 && !kIsIntel ? 14 << 10 : 0;

// Whether it does so at all. While the instructions of some twenty lines of B fit the core's window,
// their misses overlap by themselves and the hardware's prefetchers keep up; asking too costs a
// fifth. Ten instructions a line: measured on Zen 3 in fp32 and bf16, on Zen 4 in fp32 and bf16 with
// dot products. Intel's prefetchers do not keep up (Emerald Rapids: one token took 1.26 ms with asking and
// 1.84 without; bf16, H 2048, I 5632, half active).
template <class T, int R, int W>
constexpr int kStepInstructions = Compute<T>::kSub * (Compute<T>::kSub * W + R * (1 + W));
template <class T, int W>
constexpr int kStepBytes = int(sizeof(T)) * Compute<T>::kPair * W * kLanes<T>;
template <class T, int R, int W>
constexpr bool kLooksAhead = kIsIntel || 64 * kStepInstructions<T, R, W> > 10 * kStepBytes<T, W>;

// Up to so many rows take two panels at a time (W = 4). With wide vectors that gains nothing (Zen 4: within
// 3 % of one stream, either way).
constexpr int kTwoStreams = kVecBytes == 32 ? 2 : 0;
template <int W>
constexpr int kWidth = W < 2 ? W : 2;  // registers of a panel that are read one after the other

// Few rows leave few sums in flight, so K is then dealt to several sets of sums. As many for a panel
// alone as for one of two: which it is depends on the number of threads, and the bits must not.
template <int R, int W>
constexpr int kSums = R * (R <= kTwoStreams && W == 2 ? 4 : W);
template <int R, int W>
constexpr int kSets = kSums<R, W> <= 2   ? 4
                      : kSums<R, W> <= 6 ? 2
                                         : 1;

// Steps unrolled together. With 16 registers GCC interleaves them until sums are spilled (AVX2: a
// tenth), so only as many as there are sets.
template <int R, int W>
constexpr int kUnroll = kVecBytes == 64 ? 4 : kSets<R, W>;

template <class T, int R, AOrder O, int W>
DSMOE_INLINE void tile_step(Vec<CType<T>> (&acc)[R][W], const AType<T>* const* a, int64_t lda,
                            int64_t step, const T* b, int64_t second) {
  using M = Compute<T>;
  // One half of the pairs at a time: both, widened, and the sums don't fit 16 registers.
#pragma GCC unroll 2
  for (int sub = 0; sub < M::kSub; ++sub) {
    typename M::B columns[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w)
      columns[w] = M::load_b(b + w / 2 * second + w % 2 * kLanes<T> * M::kPair, sub);
    // Elements of A that one multiplication consumes: a whole pair, or one of them.
    constexpr int kTaken = M::kPair / M::kSub;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const AType<T>* p = O == kRowPointers ? a[r] + step * M::kPair + sub
                                            : a[0] + (step * M::kSub + sub) * lda + r * kTaken;
      const auto value = M::bcast(p);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[r][w] = M::mac(value, columns[w], acc[r][w]);
    }
  }
}

// count steps from step on. This loop needs no general register but those of the rows' pointers, of B
// and of an index that counts up to 0: with more in it, pointers of 12 rows are spilled and it takes
// 6 % longer.
template <class T, int R, AOrder O, int W>
DSMOE_INLINE void tile_run(Vec<CType<T>> (&acc)[kSets<R, W>][R][W], const AType<T>* const* a,
                           int64_t lda, int64_t step, int64_t count, const T* b, int64_t second) {
  using M = Compute<T>;
  constexpr int kStep = kWidth<W> * kLanes<T> * M::kPair, kS = kSets<R, W>, kU = kUnroll<R, W>;
  const int64_t whole = count / kU * kU, end = step + whole;
  const AType<T>* to[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    to[r] = O == kRowPointers ? a[r] + end * M::kPair : a[r] + end * M::kSub * lda;
#pragma GCC unroll 1
  for (int64_t i = -whole; i != 0; i += kU, b += kU * kStep) {
    if constexpr (kLooksAhead<T, R, W>) {
#pragma GCC unroll 16
      for (int j = 0; j < kU * kStep * int(sizeof(T)); j += 64) {
        __builtin_prefetch((const char*)b + kNear + j, 0, 3);
        if constexpr (W == 4) __builtin_prefetch((const char*)(b + second) + kNear + j, 0, 3);
        if constexpr (kFar > 0) __builtin_prefetch((const char*)b + kFar + j, 0, 2);
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < kU; ++u)
      tile_step<T, R, O, W>(acc[u % kS], to, lda, i + u, b + u * kStep, second);
  }
  for (int64_t i = 0; i < count - whole; ++i, b += kStep)
    tile_step<T, R, O, W>(acc[0], to, lda, i, b, second);
}

// Rounds a panel's sums to rows of out, of which `width` columns exist. A partial panel goes through a
// buffer: lanes picked by a variable would keep the sums of every panel in memory.
template <class T, int R>
DSMOE_INLINE void store_results(const Vec<CType<T>> (&sums)[R][2], T* out, int64_t stride,
                                int64_t width, bool stream) {
  T rows[R * kColumns<T>];
  const bool is_whole = width >= kColumns<T>;
  T* to = is_whole ? out : rows;
  const int64_t to_stride = is_whole ? stride : kColumns<T>;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    store_both(to + r * to_stride, sums[r][0], sums[r][1], stream && is_whole);
  if (is_whole) return;
  for (int r = 0; r < R; ++r)
    memcpy(out + r * stride, rows + r * kColumns<T>, size_t(width) * sizeof(T));
}

template <class T, int R, AOrder O, int W>
__attribute__((noinline)) static void tile(const TileArgs<T>& args) {
  using C = CType<T>;
  constexpr int kStep = kWidth<W> * kLanes<T> * Compute<T>::kPair;  // elements of B per step
  const int64_t second = W == 4 ? args.second * args.steps * kStep : 0;
  constexpr int kS = kSets<R, W>;
  const AType<T>* a[R];
  for (int r = 0; r < R; ++r) a[r] = args.a[O == kRowPointers ? r : 0];
  int64_t lda = args.lda;
  // Steps may lie on a page each: they are gathered once for all panels. With wide vectors that costs more
  // than it brings (Zen 4: 1 to 3 % of a training step).
  if (O == kStepMajor && kVecBytes < 64 && args.panels > 1) {
    constexpr int kTaken = Compute<T>::kPair / Compute<T>::kSub, kCopied = R * kTaken;
    const int64_t count = args.steps * Compute<T>::kSub;
    for (int64_t i = 0; i < count; ++i)
      memcpy(args.a_copy + i * kCopied, args.a[0] + i * lda, kCopied * sizeof(AType<T>));
    for (int r = 0; r < R; ++r) a[r] = args.a_copy;
    lda = kCopied;
  }
  const int64_t steps = args.steps;
  const T* b = args.b;
  for (int64_t panel = 0; panel < args.panels; ++panel) {
    Vec<C> acc[kS][R][W] = {};
    if (O == kRowPointers && args.accumulate) {  // at the end of a short K they would stall
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < 2 * kVecBytes; i += 64) {
          __builtin_prefetch((const char*)(args.c[r] + panel * kColumns<T>)+i, 1, 3);
          if constexpr (W == 4)
            __builtin_prefetch((const char*)(args.c[r] + (panel + args.second) * kColumns<T>)+i, 1,
                               3);
        }
    }
    if (O == kStepMajor && !args.stream) {  // these stores would wait for their lines, too
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < kColumns<T>; i += 64 / int(sizeof(T)))
          __builtin_prefetch(args.out + r * args.out_stride + panel * kColumns<T> + i, 1, 3);
    }
    for (int64_t s = 0; s < steps; s += kRun) {
      const int64_t count = min_of<int64_t>(kRun, steps - s);
      if (args.ahead) Ahead::fetch(*args.ahead, args.ahead_lines);
      tile_run<T, R, O, W>(acc, a, lda, s, count, b, second);
      b += count * kStep;
      if ((s + kRun) % kBlockSteps == 0)
        b += s + kRun + kBlockSteps <= steps ? args.skip : args.last_skip;
    }
#pragma GCC unroll 4
    for (int k = 1; k < kS; ++k)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) acc[0][r][w] += acc[k][r][w];
    if constexpr (O == kStepMajor) {
      store_results(acc[0], args.out + panel * kColumns<T>, args.out_stride,
                    args.out_width - panel * kColumns<T>, args.stream);
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int w = 0; w < W; ++w) {
          C* c = args.c[r] + (panel + w / 2 * args.second) * kColumns<T> + w % 2 * kLanes<T>;
          store(c, args.accumulate ? acc[0][r][w] + load(c) : acc[0][r][w]);
        }
    }
  }
}

// A row or two times several panels, two at a time: read as two streams B comes at 25 GB/s instead of
// 20 (Zen 3).
template <class T, int R>
static void two_streams(const TileArgs<T>& args) {
  TileArgs<T> both = args;
  both.second = both.panels /= 2;
  both.ahead_lines *= 2;  // half as many runs
  tile<T, R, kRowPointers, 4>(both);
  if (args.panels % 2 == 0) return;
  const int64_t last = args.panels - 1;
  both.panels = 1;
  both.ahead_lines = args.ahead_lines;
  both.b += last * args.steps * kColumns<T> * Compute<T>::kPair;
  for (int r = 0; r < R; ++r) both.c[r] += last * kColumns<T>;
  tile<T, R, kRowPointers, 2>(both);
}

// Run-time row count to compile-time tile. W: registers per row; 1 where only half a panel is wanted,
// 4 for two panels.
template <class T, AOrder O, int W = 2, int R = 1>
static void run_tile(int rows, const TileArgs<T>& args) {
  if constexpr (R < kMaxRows) {
    if (rows != R) return run_tile<T, O, W, R + 1>(rows, args);
  }
  if constexpr (R <= kTwoStreams && O == kRowPointers && W == 2) {
    if (args.panels > 1) return two_streams<T, R>(args);
  }
  tile<T, R, O, W>(args);
}

// Cuts count rows into as few tiles as fit, of nearly equal even height (bf16 pairs never straddle
// two tiles).
template <class F>
DSMOE_INLINE void for_each_tile(int64_t count, F f) {
  const int64_t pairs = ceil_div(count, 2), tiles = ceil_div(pairs, kMaxRows / 2);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t begin = pairs * i / tiles * 2, end = min_of(pairs * (i + 1) / tiles * 2, count);
    f(begin, int(end - begin));
  }
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

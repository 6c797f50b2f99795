// router:  logits [T,R] = x [T,H] W^T [H,R] + b, and the sigmoid of route (kernels.h).
//
// x in any dtype, W, b and sums in fp32 (fp64 if x is). Up to kDotTokens tokens the time is that of
// reading W once: plain dot products along its rows. Beyond, W is packed into panels by all threads,
// and blocks of tokens, widened into a thread's scratch, are multiplied with every panel by the tile
// of gemm_tile.h. Blocks and tiles do not depend on the number of threads, and so neither do the bits.
#include "expert_mlp_isa.h"
#include "passes.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {
namespace {

constexpr int64_t kDotTokens = 4;
constexpr int64_t kBlockTokens = 24;        // [24, 2048] in fp32 is a fifth of L2
constexpr int64_t kThreadWork = 256 << 10;  // multiply-adds that take about ten microseconds

template <class T>
void widen_row(const T* from, int64_t n, CType<T>* to) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = widen(from[i]);
}

template <class C>
C dot(const C* a, const C* b, int64_t n) {
  constexpr int kSums = 4;
  Vec<C> sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums * kLanes<C> <= n; i += kSums * kLanes<C>)
    for (int j = 0; j < kSums; ++j)
      sums[j] = fma(load(a + i + j * kLanes<C>), load(b + i + j * kLanes<C>), sums[j]);
  for (; i + kLanes<C> <= n; i += kLanes<C>) sums[0] = fma(load(a + i), load(b + i), sums[0]);
  const Vec<C> all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  C total = 0;
  for (int j = 0; j < kLanes<C>; ++j) total += all[j];
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

template <class T>
struct Router {
  using C = CType<T>;
  const RouterParams& p;
  struct Sync {
    Barrier barrier;
    alignas(64) int64_t next_block;
  }* sync = nullptr;
  C* rows = nullptr;    // per thread [kBlockTokens, H]; or [T,H] of all, for dot products
  C* packed = nullptr;  // [R / kColumns] panels
  const C* weight() const { return (const C*)p.weight; }
  int64_t panels() const { return ceil_div(p.num_routed, kColumns<C>); }
  int64_t panel_size() const { return p.hidden_size * kColumns<C>; }
  C bias(int64_t r) const { return p.bias ? ((const C*)p.bias)[r] : C(0); }

  void dots(int thread, int team_size) {
    const int64_t begin = p.num_routed * thread / team_size,
                  end = p.num_routed * (thread + 1) / team_size;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t t = 0; t < p.num_tokens; ++t)
        ((C*)p.logits)[t * p.num_routed + r] =
            dot(rows + t * p.hidden_size, weight() + r * p.hidden_size, p.hidden_size) + bias(r);
  }

  void block(int64_t begin, int64_t end, C* x) {
    for (int64_t t = begin; t < end; ++t)
      widen_row((const T*)p.x + t * p.x_stride, p.hidden_size, x + (t - begin) * p.hidden_size);
    alignas(64) C sums[kMaxRows][kColumns<C>];
    TileArgs<C> args;
    args.steps = p.hidden_size;
    args.accumulate = false;
    for (int r = 0; r < kMaxRows; ++r) args.c[r] = sums[r];
    for (int64_t panel = 0; panel < panels(); ++panel) {
      args.b = packed + panel * panel_size();
      const int64_t column = panel * kColumns<C>;
      const int64_t width = min_of<int64_t>(kColumns<C>, p.num_routed - column);
      for_each_tile(end - begin, [&](int64_t first, int count) {
        for (int r = 0; r < count; ++r) args.a[r] = x + (first + r) * p.hidden_size;
        run_tile<C, kRowPointers>(count, args);
        for (int r = 0; r < count; ++r) {
          C* out = (C*)p.logits + (begin + first + r) * p.num_routed + column;
          for (int64_t i = 0; i < width; ++i) out[i] = sums[r][i] + bias(column + i);
        }
      });
    }
  }

  void run(int thread, int team_size) {
    for (int64_t panel = thread; panel < panels(); panel += team_size) {
      const int64_t first = panel * kColumns<C>;
      const C* from = weight() + first * p.hidden_size;
      pack_rows(from, p.num_routed - first, from + kLanes<C> * p.hidden_size,
                p.num_routed - first - kLanes<C>, p.hidden_size, p.hidden_size,
                packed + panel * panel_size());
    }
    barrier_wait(sync->barrier, team_size);
    const int64_t blocks = ceil_div(p.num_tokens, kBlockTokens);
    for (int64_t i; (i = draw(sync->next_block)) < blocks;)
      block(p.num_tokens * i / blocks, p.num_tokens * (i + 1) / blocks,
            rows + thread * kBlockTokens * p.hidden_size);
  }
};

template <class T>
Status router_of(const RouterParams& p, const Team& team) {
  if (p.num_tokens == 0 || p.num_routed == 0) return Status::kOk;
  Router<T> w{p};
  const bool is_small = p.num_tokens <= kDotTokens;
  const int threads =
      int(max_of<int64_t>(1, min_of<int64_t>(team.max_size, p.num_tokens * p.num_routed *
                                                                p.hidden_size / kThreadWork)));
  void* memory = allocate([&](Arena& arena) {
    arena.take(w.sync, 1);
    arena.take(w.rows, (is_small ? p.num_tokens : threads * kBlockTokens) * p.hidden_size);
    arena.take(w.packed, is_small ? 0 : w.panels() * w.panel_size());
  });
  if (!memory) return Status::kWorkspaceTooSmall;
  *w.sync = {};
  for (int64_t t = 0; is_small && t < p.num_tokens; ++t)
    widen_row((const T*)p.x + t * p.x_stride, p.hidden_size, w.rows + t * p.hidden_size);
  const auto body = [](void* arg, int thread, int size) {
    Router<T>& router = *(Router<T>*)arg;
    router.p.num_tokens <= kDotTokens ? router.dots(thread, size) : router.run(thread, size);
  };
  run_team(team, threads, body, &w);
  workspace_release(memory);
  return Status::kOk;
}

}  // namespace

Status router(const RouterParams& p, const Team& team) {
  switch (p.dtype) {
    case Dtype::kFloat64:
      return router_of<double>(p, team);
    case Dtype::kFloat32:
      return router_of<float>(p, team);
    case Dtype::kBFloat16:
      return router_of<bf16>(p, team);
    case Dtype::kFloat16:
      return router_of<fp16>(p, team);
  }
  return Status::kUnsupported;
}

void sigmoids(const float* from, float* to, int64_t n) {
  constexpr int kL = kLanes<float>;
  for (int64_t i = 0; i < n; i += kL) {
    const int64_t count = min_of<int64_t>(kL, n - i);
    float part[kL] = {};
    if (count < kL) memcpy(part, from + i, size_t(count) * sizeof(float));
    const Vec<float> z = load(count < kL ? part : from + i), s = sigmoid(z);
    store(part, z < splat(-88.0f) ? splat(0.0f) : s);  // below, exp would not grow any more
    memcpy(to + i, part, size_t(count) * sizeof(float));
  }
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

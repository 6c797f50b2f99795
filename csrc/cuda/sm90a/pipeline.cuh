// The main loop of sm_90a: one warpgroup fetches, two multiply; mbarriers hand stages to and fro.
//
// A step takes kTerms = 64 of the sum: lines of 128 bytes. Its stage holds up to 256 gathered rows
// (the copy engine cannot gather: cp.async, by all threads of the fetching warpgroup) and up to 192
// columns' weights (copy engine, one thread). 56 KiB a stage, four stages.
//
//   full[stage]    the fetching warps arrive once their rows have landed; the engine counts bytes
//   empty[stage]   the multiplying warps arrive once their wgmmas have read
//
// Each multiplying warpgroup takes every other block of 64 rows, at most two: 2 x 64 x 192 sums are
// 192 registers of a thread. Blocks without rows are neither copied nor multiplied. A step of 256 rows
// by 192 columns keeps the tensor cores busy for 1,536 cycles; meanwhile shared memory takes 56 KiB in
// and gives 4 x 4 x 8 KiB out, 1,472 cycles, and L2's share of one SM of 132 is 58 KiB. Smaller tiles
// would wait for L2, and do: see dsmoe bench gpu-model.
#pragma once

#include "cuda/sm90a/wgmma.cuh"
#include "cuda/token_pass.cuh"

namespace dsmoe::cuda::sm90a {

constexpr int kTerms = 64;
constexpr int kBlockRows = 64, kMaxRows = 256;
constexpr int kGroup = 128;  // threads of a warpgroup
constexpr int kConsumers = 2 * kGroup;
constexpr int kThreads = kConsumers + kGroup;
constexpr int kLine = 128, kEightLines = 8 * kLine;  // bytes
constexpr int kBlockBytes = kBlockRows * kLine;
constexpr int kRowsBytes = kMaxRows * kLine;
constexpr int kWeightsBytes = 192 * kLine;
constexpr int kStageBytes = kRowsBytes + kWeightsBytes;
constexpr int kStages = 4;
constexpr int kLag = 2;  // steps whose rows are on their way while the next are asked for
constexpr int kSharedBytes = kStages * kStageBytes + 2 * kStages * 8;
static_assert(kSharedBytes <= 227 << 10);
// A stage is freed once the step after its own is multiplied, which is handed over kLag steps late.
static_assert(kLag + 2 <= kStages, "fetching and multiplying would wait for each other");

// The compiler gives every thread 65536 / 384, 168 registers; those that multiply want more, those that
// fetch need fewer. First of all in a role's branch.
template <int kFetching, int kMultiplying>
struct Registers {
  static_assert(kGroup * kFetching + kConsumers * kMultiplying <= 168 * kThreads);
  static __device__ __forceinline__ void fetch() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFetching) : "memory");
  }
  static __device__ __forceinline__ void multiply() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kMultiplying) : "memory");
  }
};

// Stage and phase of a role's next step.
class Ring {
 public:
  __device__ explicit Ring(uint32_t base) : base_(base) {}
  __device__ uint32_t stage() const { return base_ + index_ * kStageBytes; }
  __device__ uint32_t full() const { return base_ + kStages * kStageBytes + index_ * 8; }
  __device__ uint32_t empty() const { return full() + kStages * 8; }
  __device__ uint32_t phase() const { return phase_; }
  __device__ void advance() {
    index_ = index_ + 1 == kStages ? 0 : index_ + 1;
    phase_ ^= index_ == 0;
  }

 private:
  uint32_t base_;
  int index_ = 0;
  uint32_t phase_ = 0;
};

// By all threads of the CTA, first of all.
__device__ __forceinline__ void make_mbarriers(uint32_t base) {
  if (threadIdx.x == 0) {
    Ring ring(base);
    for (int i = 0; i < kStages; ++i, ring.advance()) {
      mbarrier_init(ring.full(), kGroup / kWarp + 1);
      mbarrier_init(ring.empty(), kConsumers / kWarp);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
}

// The fetching warpgroup's side.
class Producer {
 public:
  __device__ explicit Producer(uint32_t base) : next_(base), landed_(base) {}

  // Waits until the next stage is free. The weights may come in `bytes` from the copy engine: the
  // thread that gets true asks it for them.
  __device__ bool begin(int bytes) {
    sm90a::wait(next_.empty(), next_.phase() ^ 1);
    if (threadIdx.x != kConsumers) return false;
    arrive_expecting(next_.full(), bytes);
    return bytes > 0;
  }
  __device__ uint32_t stage() const { return next_.stage(); }
  __device__ uint32_t full() const { return next_.full(); }
  // All of this thread's copies to the stage have been asked for.
  __device__ void end() {
    cp_async_commit();
    next_.advance();
    if (behind_ == kLag) {
      cp_async_wait<kLag>();
      hand_over();
    } else {
      ++behind_;
    }
  }
  __device__ void finish() {
    cp_async_wait<0>();
#pragma unroll 1  // at most kLag times
    for (; behind_ > 0; --behind_) hand_over();
  }

 private:
  __device__ void hand_over() {
    proxy_fence();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) arrive(landed_.full());
    landed_.advance();
  }

  Ring next_, landed_;
  int behind_ = 0;
};

// A multiplying warpgroup's side: adds a tile's products to the sums, kLive blocks of 64 rows by
// 2 kSums columns. kAcrossRows, kAcross: the lines of the rows, of the weights run across the sum.
template <class T, int kAcrossRows, int kAcross, int kSums, int kLive>
__device__ __forceinline__ void multiply(Ring& ring, int num_steps, float (&sums)[kLive][kSums]) {
  const int group = threadIdx.x / kGroup;
  constexpr int kStepOfRows = kAcrossRows ? 16 * kLine : 32;  // bytes to the next 16 terms
  constexpr int kStepOfWeights = kAcross ? 16 * kLine : 32;
  auto release = [](const Ring& done) {
    if (threadIdx.x % kWarp == 0) arrive(done.empty());
  };
  Ring before = ring;
  for (int step = 0; step < num_steps; ++step) {
    sm90a::wait(ring.full(), ring.phase());
    const uint32_t rows = ring.stage() + group * kBlockBytes, weights = ring.stage() + kRowsBytes;
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kTerms / 16; ++k) {
      const uint64_t right = descriptor(weights + k * kStepOfWeights, kTerms * kLine, kEightLines);
#pragma unroll
      for (int block = 0; block < kLive; ++block) {
        const uint64_t left =
            descriptor(rows + block * 2 * kBlockBytes + k * kStepOfRows, 16, kEightLines);
        wgmma<kAcrossRows, kAcross>(sums[block], left, right, T());
      }
    }
    wgmma_commit();
    wgmma_wait<1>();  // the step before has been read
    if (step > 0) release(before);
    before = ring;
    ring.advance();
  }
  wgmma_wait<0>();
#pragma unroll
  for (int block = 0; block < kLive; ++block) hold(sums[block]);
  if (num_steps > 0) release(before);
}

// The same for a warpgroup that has no rows in the tile. A lane that still waited when its warp arrived
// might miss the phase; where products are made, wgmma's fence keeps the lanes together.
__device__ __forceinline__ void pass_by(Ring& ring, int num_steps) {
  for (int step = 0; step < num_steps; ++step, ring.advance()) {
    sm90a::wait(ring.full(), ring.phase());
    __syncwarp();
    if (threadIdx.x % kWarp == 0) arrive(ring.empty());
  }
}

// Blocks of 64 rows in a tile, and how many of them a multiplying warpgroup has.
__device__ __forceinline__ int blocks_of(int rows) {
  return ceil_div(rows, kBlockRows);
}
__device__ __forceinline__ int live_blocks(int rows, int group) {
  return (blocks_of(rows) - group + 1) / 2;
}

// The tile's row of a thread's sums [block][4 j + 2 half + ..], in a multiplying warpgroup.
__device__ __forceinline__ int row_of_sums(int block, int half) {
  const int group = threadIdx.x / kGroup, warp = threadIdx.x % kGroup / kWarp;
  return (2 * block + group) * kBlockRows + warp * 16 + half * 8 + threadIdx.x % kWarp / 4;
}

// ---- gathered rows: a thread of the fetching warpgroup copies chunk t % 8 of every 16th row

constexpr int kChunks = kLine / 16;
constexpr int kRowsAtOnce = kGroup / kChunks;
constexpr int kRowCopies = kMaxRows / kRowsAtOnce;

// Where the rows that this thread copies begin, from some matrix's start on. In 16 bytes: 32 bits reach 64
// GiB, and an address is one instruction.
struct GatheredRows {
  static constexpr uint32_t kNone = UINT32_MAX;
  uint32_t from[kRowCopies];
  __device__ __forceinline__ void set(int i, bool exists, int64_t row, int64_t stride) {
    const auto chunks = static_cast<uint32_t>(stride / kChunk);
    from[i] = exists ? static_cast<uint32_t>(row) * chunks : kNone;
  }
};

// 64 numbers of every row, from `matrix` on; valid: whether this thread's chunk exists. What does not becomes
// zeros.
template <class T>
__device__ __forceinline__ void copy_rows(uint32_t to, int rows, bool valid, const T* matrix,
                                          const GatheredRows& gathered) {
  const int t = threadIdx.x % kGroup, chunk = t % kChunks, first = t / kChunks;
  const T* mine = matrix + chunk * kChunk;
  to += first * kLine + (chunk ^ first % 8) * 16;
#pragma unroll
  for (int i = 0; i < kRowCopies; ++i) {
    if (i * kRowsAtOnce % kBlockRows == 0 && i * kRowsAtOnce >= rows) break;
    cp_async_16(to + i * kRowsAtOnce * kLine, mine + uint64_t{gathered.from[i]} * kChunk,
                valid && gathered.from[i] != GatheredRows::kNone);
  }
}
static_assert(kRowsAtOnce % 8 == 0, "a thread's rows have the same exchange of chunks");

}  // namespace dsmoe::cuda::sm90a

// Peaks of the machine, measured: arithmetic on registers alone, and reads of a buffer of 256 MiB.
//
// Functions carry their instruction set as an attribute instead of a compiler flag, so that this
// one file needs no variants. 16 independent accumulators hide an FMA's latency (4 cycles, 2 a
// cycle need 8) without spilling.
#include "cpu/machine.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "cpu/team.h"

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace dsmoe::cpu {
namespace {

constexpr int kAccumulators = 16;
constexpr int64_t kSteps = 2000000;  // some milliseconds: starting a thread must not count
constexpr size_t kBytes = size_t{256} << 20, kHugePage = size_t{2} << 20;
constexpr size_t kStream = size_t{128} << 10;  // read in one go

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Each returns operations done; `sink` keeps the result alive.
using Kernel = double (*)(float* sink);

double fma_portable(float* sink) {
  float acc[64] = {};
  for (int64_t i = 0; i < kSteps; ++i) {
    for (float& a : acc) a = a * 0.999f + 0.001f;
  }
  *sink = acc[0];
  return 2.0 * kSteps * 64;
}

#ifdef __x86_64__
// The empty asm keeps a sum in its register from step to step and stops the compiler from folding steps.
[[gnu::target("avx2,fma")]] double fma_avx2(float* sink) {
  constexpr int kSums = 12;
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
  __m256 acc[kSums];
#pragma GCC unroll 16
  for (int j = 0; j < kSums; ++j) acc[j] = b;
  for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kSums; ++j) {
      acc[j] = _mm256_fmadd_ps(acc[j], a, b);
      asm volatile("" : "+x"(acc[j]));
    }
  }
#pragma GCC unroll 16
  for (int j = 1; j < kSums; ++j) acc[0] = _mm256_add_ps(acc[0], acc[j]);
  *sink = _mm256_cvtss_f32(acc[0]);
  return 2.0 * kSteps * kSums * 8;
}

[[gnu::target("avx512f")]] double fma_avx512(float* sink) {
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
  __m512 acc[kAccumulators];
#pragma GCC unroll 16
  for (int j = 0; j < kAccumulators; ++j) acc[j] = b;
  for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kAccumulators; ++j) {
      acc[j] = _mm512_fmadd_ps(acc[j], a, b);
      asm volatile("" : "+v"(acc[j]));
    }
  }
#pragma GCC unroll 16
  for (int j = 1; j < kAccumulators; ++j) acc[0] = _mm512_add_ps(acc[0], acc[j]);
  *sink = _mm512_cvtss_f32(acc[0]);
  return 2.0 * kSteps * kAccumulators * 16;
}

[[gnu::target("avx512f,avx512bf16")]] double dot_avx512_bf16(float* sink) {
  const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.25f));
  __m512 acc[kAccumulators];
#pragma GCC unroll 16
  for (int j = 0; j < kAccumulators; ++j) acc[j] = _mm512_setzero_ps();
  for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < kAccumulators; ++j) {
      acc[j] = _mm512_dpbf16_ps(acc[j], a, a);
      asm volatile("" : "+v"(acc[j]));
    }
  }
#pragma GCC unroll 16
  for (int j = 1; j < kAccumulators; ++j) acc[0] = _mm512_add_ps(acc[0], acc[j]);
  *sink = _mm512_cvtss_f32(acc[0]);
  return 2.0 * kSteps * kAccumulators * 32;
}

// Four sums, and operands that stay where they are, whatever they are.
[[gnu::target("amx-tile,amx-bf16")]] double dot_amx_bf16(float* sink) {
  alignas(64) static constexpr struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } kConfig;
  asm volatile("ldtilecfg %0" ::"m"(kConfig));
  for (int64_t i = 0; i < kSteps / 16; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  *sink = 0;
  return 2.0 * (kSteps / 16) * 4 * 16 * 16 * 32;
}

// Two streams, as AVX2's kernels read the weights of a row or two: the prefetchers follow both further
// than one (Zen 3: 25 instead of 21 GB/s). Summed in eight chains, which keep up with memory.
[[gnu::target("avx2")]] double read_avx2(const char* data, size_t bytes) {
  __m256i sum[8];
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  for (const char* at = data; at + 2 * kStream <= data + bytes; at += 2 * kStream) {
    for (size_t i = 0; i < kStream; i += 128) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const auto* from = reinterpret_cast<const __m256i*>(at + j / 4 * kStream + i + j % 4 * 32);
        sum[j] = _mm256_add_epi64(sum[j], _mm256_loadu_si256(from));
      }
    }
  }
  for (int j = 1; j < 8; ++j) sum[0] = _mm256_add_epi64(sum[0], sum[j]);
  return static_cast<double>(_mm256_extract_epi64(sum[0], 0));
}
#endif

double read_portable(const char* data, size_t bytes) {
  uint64_t sum[8] = {}, word[8];
  for (size_t i = 0; i + 64 <= bytes; i += 64) {
    std::memcpy(word, data + i, 64);
    for (int j = 0; j < 8; ++j) sum[j] += word[j];
  }
  return static_cast<double>(sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7]);
}

// The highest rate of `rounds` rounds; body(thread) returns the amount it did.
template <class Body>
double best_rate(int threads, int rounds, const Body& body) {
  double best = 0;
  for (int round = 0; round < rounds; ++round) {
    std::vector<double> amount(threads);
    std::vector<std::thread> others;
    const auto start = std::chrono::steady_clock::now();
    for (int t = 1; t < threads; ++t) others.emplace_back([&, t] { amount[t] = body(t); });
    amount[0] = body(0);
    for (std::thread& thread : others) thread.join();
    double total = 0;
    for (double a : amount) total += a;
    best = std::max(best, total / seconds_since(start));
  }
  return best;
}

double arithmetic_rate(int threads, Kernel kernel) {
  return best_rate(threads, 8, [&](int) {
    float sink = 0;
    const double done = kernel(&sink);
    return sink == 12345.0f ? 0.0 : done;
  });
}

}  // namespace

namespace {
struct Amx {
  AmxState state = AmxState::kAbsent;
  std::string text = "none";
};
const Amx& amx() {
  static const Amx found = [] {
    Amx amx;
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // CPUID 7.0, edx
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile))
      return amx;
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) {
      amx.state = AmxState::kUsable;
      amx.text = "usable";
    } else {
      amx.state = AmxState::kRefused;
      amx.text = std::string("refused by the system (") + std::strerror(errno) +
                 "): it may be an old kernel or a filter of system calls";
    }
#endif
    return amx;
  }();
  return found;
}
}  // namespace

AmxState amx_state() {
  return amx().state;
}
const char* amx_state_text() {
  return amx().text.c_str();
}

Peaks measure_peaks(int threads) {
  threads = std::max(threads, 1);
  Kernel fma = fma_portable, dot = nullptr;
  auto read = read_portable;
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    fma = fma_avx2;
    read = read_avx2;
  }
  if (__builtin_cpu_supports("avx512f")) fma = fma_avx512;
  if (__builtin_cpu_supports("avx512bf16")) dot = dot_avx512_bf16;
  if (amx_state() == AmxState::kUsable) dot = dot_amx_bf16;
#endif
  // Huge pages, as under packed weights: with small ones the walks through page tables are measured.
  const std::unique_ptr<char, void (*)(void*)> buffer(
      static_cast<char*>(std::aligned_alloc(kHugePage, kBytes)), std::free);
  if (!buffer) throw std::bad_alloc();
  prefer_huge_pages(buffer.get(), kBytes);
  std::memset(buffer.get(), 1, kBytes);
  const size_t readers = std::min<size_t>(threads, kBytes / (2 * kStream));
  const size_t share = kBytes / readers / (2 * kStream) * (2 * kStream);
  Peaks peaks{};
  peaks.fp32_flops = arithmetic_rate(threads, fma);
  peaks.bf16_flops = dot ? arithmetic_rate(threads, dot) : 0;
  peaks.read_bytes = best_rate(threads, 6, [&](int thread) {
    const double sum = read(buffer.get() + thread % readers * share, share);
    return sum == 12345.0 ? 0.0 : static_cast<double>(share);
  });
  return peaks;
}

}  // namespace dsmoe::cpu

// What the kernels of every ISA share at run time: barriers, work counters and scratch memory.
// Compiled once, without ISA flags; the kernels call these functions and never inline them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace dsmoe::cpu {

// Zero-initialised memory that all threads of a team see, in cache lines of its own.
struct alignas(64) Barrier {
  int32_t arrived;
  int32_t generation;
};

// Waits until size threads have come. Spins (phases last microseconds), then yields: the machine
// may be shared.
void barrier_wait(Barrier& barrier, int size);

// The next number of a counter that threads draw work from.
int64_t draw(int64_t& counter);

// Scratch memory aligned to 64 bytes, contents undefined; null if there is none. One block is kept
// between calls: fresh pages would cost more than the work of a small op.
void* workspace_acquire(size_t bytes);
void workspace_release(void* workspace);

// Asks for huge pages under memory that is about to be written for the first time. Weights that are streamed from them at
// one token took 0.74 ms instead of 0.97 (bf16, H 2048, I 5632, half active): fewer TLB misses, longer prefetches.
void prefer_huge_pages(void* memory, size_t bytes);

void run_team(const Team& team, int max_size, void (*body)(void* arg, int thread, int size),
              void* arg);

// sigmoid of n numbers with the instruction set in use, for route.
void sigmoids(const float* from, float* to, int64_t n);

// One per ISA: the entry points that expert_mlp.cpp chooses from.
struct Kernels {
  Status (*forward)(const ExpertMlpParams&, const Team&);
  Status (*backward)(const ExpertMlpBackwardParams&, const Team&);
  int64_t (*packed_bytes)(const PackParams&);
  Status (*pack)(const PackParams&, const Team&);
  int64_t (*quantized_bytes)(const PackQuantizedParams&);
  Status (*pack_quantized)(const PackQuantizedParams&, const Team&);
  Status (*router)(const RouterParams&, const Team&);
  void (*sigmoids)(const float* from, float* to, int64_t n);
};

}  // namespace dsmoe::cpu

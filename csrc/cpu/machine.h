// What this machine can do at most: the roofline that benchmarks compare with.
#pragma once

#include <cstdint>

namespace dsmoe::cpu {

struct Peaks {
  double fp32_flops;  // fused multiply-adds on registers, two operations each, per second
  double bf16_flops;  // tdpbf16ps on tiles, else vdpbf16ps on registers; 0 where both are missing
  double read_bytes;  // streaming reads of memory far beyond the caches, per second
};

// Whether the CPU has AMX tiles of bf16 and this process may use them: Linux asks for a request, once.
bool has_amx_bf16();

// The best of several short measurements on `threads` threads at once, about half a second in all.
[[gnu::visibility("default")]] Peaks measure_peaks(int threads);

}  // namespace dsmoe::cpu

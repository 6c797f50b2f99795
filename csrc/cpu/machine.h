// What this machine can do at most: the roofline that benchmarks compare with.
#pragma once

#include <cstdint>

namespace dsmoe::cpu {

struct Peaks {
  double fp32_flops;  // fused multiply-adds on registers, two operations each, per second
  double bf16_flops;  // tdpbf16ps on tiles, else vdpbf16ps on registers; 0 where both are missing
  double read_bytes;  // streaming reads of memory far beyond the caches, per second
};

// AMX tiles of bf16: whether the processor has them, and whether Linux gives them to this process, which has to
// ask, once. A container's system call filter may refuse, and so does a kernel that does not know them.
enum class AmxState { kAbsent, kRefused, kUsable };
AmxState amx_state();
// The same in words, with the system's reason.
[[gnu::visibility("default")]] const char* amx_state_text();

// The best of several short measurements on `threads` threads at once, about half a second in all.
[[gnu::visibility("default")]] Peaks measure_peaks(int threads);

}  // namespace dsmoe::cpu

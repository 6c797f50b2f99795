// Chooses the instruction set at run time: the best that this build and this machine have, or what
// DSMOE_ISA names.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "cpu/machine.h"
#include "cpu/team.h"
#include "kernels.h"

namespace dsmoe::cpu {

namespace portable {
const Kernels* kernels();
}
#ifdef DSMOE_X86
namespace avx2 {
const Kernels* kernels();
}
namespace avx512 {
const Kernels* kernels();
}
namespace avx512_bf16 {
const Kernels* kernels();
}
namespace amx_bf16 {
const Kernels* kernels();
}
#endif
#ifdef DSMOE_TESTS
namespace amx_emulated {
const Kernels* kernels();
}
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* (*kernels)();
  bool (*is_supported)();
};

#ifdef DSMOE_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

// Best first.
const Isa kIsas[] = {
#ifdef DSMOE_X86
    {"amx_bf16", amx_bf16::kernels,
     [] { return has_avx512_bf16() && amx_state() == AmxState::kUsable; }},
    // Intel's cores issue vdpbf16ps every other cycle, half the rate of fp32 (Emerald Rapids: 82 and 172
    // GFLOP/s), AMD's at twice that rate: where tiles are masked, Intel's widen.
    {"avx512_bf16", avx512_bf16::kernels,
     [] { return has_avx512_bf16() && !__builtin_cpu_is("intel"); }},
    {"avx512", avx512::kernels, has_avx512},
    {"avx512_bf16", avx512_bf16::kernels,
     [] { return has_avx512_bf16() && __builtin_cpu_is("intel"); }},
    {"avx2", avx2::kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
    {"portable", portable::kernels, [] { return true; }},
#ifdef DSMOE_TESTS
    {"amx_emulated", amx_emulated::kernels, [] { return true; }},
#endif
};
constexpr int kNumIsas = sizeof kIsas / sizeof *kIsas;

const Isa* find(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) == 0 && isa.is_supported()) return &isa;
  }
  return nullptr;
}

const Isa* best() {
  if (const char* forced = std::getenv("DSMOE_ISA")) {
    if (const Isa* isa = find(forced))
      return isa;  // the binding reports an unknown name when it is imported
  }
  for (const Isa& isa : kIsas) {
    if (isa.is_supported()) return &isa;
  }
  return &kIsas[kNumIsas - 1];
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{best()};
  return isa;
}

const Kernels& kernels() {
  return *current().load(std::memory_order_relaxed)->kernels();
}

}  // namespace

Status expert_mlp(const ExpertMlpParams& params, const Team& team) {
  return kernels().forward(params, team);
}
Status expert_mlp_backward(const ExpertMlpBackwardParams& params, const Team& team) {
  return kernels().backward(params, team);
}
Status router(const RouterParams& params, const Team& team) {
  return kernels().router(params, team);
}
void sigmoids(const float* from, float* to, int64_t n) {
  kernels().sigmoids(from, to, n);
}
int64_t packed_bytes(const PackParams& params) {
  return kernels().packed_bytes(params);
}
Status pack_weights(const PackParams& params, const Team& team) {
  return kernels().pack(params, team);
}
int64_t quantized_bytes(const PackQuantizedParams& params) {
  return kernels().quantized_bytes(params);
}
Status pack_quantized(const PackQuantizedParams& params, const Team& team) {
  return kernels().pack_quantized(params, team);
}

const char* isa() {
  return current().load(std::memory_order_relaxed)->name;
}

const char* const* isas() {
  static const char* const* const names = [] {
    static const char* list[kNumIsas + 1] = {};
    int n = 0;
    for (const Isa& isa : kIsas) {
      if (isa.is_supported()) list[n++] = isa.name;
    }
    return list;
  }();
  return names;
}

bool force_isa(const char* name) {
  const Isa* isa = find(name);
  if (isa) current().store(isa, std::memory_order_relaxed);
  return isa != nullptr;
}

}  // namespace dsmoe::cpu

// Chooses the instruction set at run time: the best that this build and this machine have, or what
// DSMOE_ISA names.
#include <atomic>
#include <cstdlib>
#include <cstring>

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
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels* (*kernels)();
  bool (*is_supported)();
};

// Best first.
const Isa kIsas[] = {
#ifdef DSMOE_X86
    {"avx512_bf16", avx512_bf16::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512bf16");
     }},
    {"avx512", avx512::kernels,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     }},
    {"avx2", avx2::kernels,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
    {"portable", portable::kernels, [] { return true; }},
};
constexpr int kNumIsas = sizeof kIsas / sizeof *kIsas;

const Isa* find(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) == 0) return isa.is_supported() ? &isa : nullptr;
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

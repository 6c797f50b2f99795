// Tiles are state of a thread: nobody may lose them, and nobody may notice ours.
//
//   tile_state_test               every ISA for three seconds in all; DSMOE_TEST_SECONDS=60 for longer
//   tile_state_test refused       without permission to use tiles, as under a seccomp filter
//
// Several threads a core multiply the same problem over and over, each alone, so that the system takes the
// processor from them in the middle of a tile; all of them must find the same bits every time.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/machine.h"
#include "kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace dsmoe;

namespace {

std::atomic<int> failures{0};

void check(const std::string& what, bool ok) {
  if (ok) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

cpu::Team alone() {
  return {1, nullptr,
          [](void*, int, void (*body)(void*, int, int), void* arg) { body(arg, 0, 1); }};
}

// Some hundred tokens on four experts in bf16, 20 multiplications of tiles a panel.
class Multiplication {
 public:
  Multiplication() {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (auto* values : {&x_, &gate_, &up_, &down_}) {
      values->resize(values == &x_ ? kTokens * kHidden : kNeurons * kHidden);
      for (uint16_t& value : *values) {
        const float f = normal(random) / 4;
        uint32_t bits;
        std::memcpy(&bits, &f, 4);
        value = uint16_t(bits >> 16);
      }
    }
    gates_.assign(kTokens * kExperts, 0);
    for (float& gate : gates_) gate = random() % 2 ? 1.0f : 0.0f;
  }
  std::vector<uint16_t> result() {
    std::vector<uint16_t> y(kTokens * kHidden);
    ExpertMlpParams p{};
    p.dtype = Dtype::kBFloat16;
    p.num_tokens = kTokens, p.hidden_size = kHidden, p.intermediate_size = kNeurons;
    p.num_experts = kExperts;
    p.gate_up = p.down = {0, kHidden, 1};
    p.x_stride = kHidden, p.x = x_.data(), p.gates = gates_.data();
    p.gate_proj = gate_.data(), p.up_proj = up_.data(), p.down_proj_t = down_.data();
    p.expert_offsets = offsets_;
    p.y = y.data();
    check("forward", cpu::expert_mlp(p, alone()) == Status::kOk);
    return y;
  }

 private:
  static constexpr int kTokens = 150, kHidden = 320, kExperts = 4, kNeurons = 256;
  const int32_t offsets_[kExperts + 1] = {0, 64, 128, 192, 256};
  std::vector<uint16_t> x_, gate_, up_, down_;
  std::vector<float> gates_;
};

// A caller's own configuration of tiles, as torch's matrix products leave one behind.
#if defined(__x86_64__) && defined(__linux__)
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {32, 16, 64};
  uint8_t rows[16] = {7, 4, 16};
};
[[gnu::target("amx-tile")]] void set(const Config& config) {
  asm volatile("ldtilecfg %0" ::"m"(config));
}
[[gnu::target("amx-tile")]] Config current() {
  Config config;
  asm volatile("sttilecfg %0" : "=m"(config));
  return config;
}
[[gnu::target("amx-tile")]] void release() {
  asm volatile("tilerelease");
}
void check_configuration(Multiplication& multiplication) {
  release();
  multiplication.result();
  check("tiles stay configured behind a call", current().palette == 0);
  const Config callers;
  set(callers);
  multiplication.result();
  const Config left = current();
  check("a caller loses the configuration of his tiles",
        !std::memcmp(&left, &callers, sizeof left));
  release();
}

// From here on the system refuses this process tiles, as a container's filter may.
void refuse_permission() {
  constexpr uint32_t kRequestPermission = 0x1023;
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, args[0])),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, kRequestPermission, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog filter = {sizeof program / sizeof *program, program};
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0) {
    std::printf("this system allows no filter\n");
    std::exit(0);
  }
}
#else
void check_configuration(Multiplication&) {}
void refuse_permission() {}
#endif

bool is_listed(const char* wanted) {
  for (const char* const* isa = cpu::isas(); *isa; ++isa)
    if (!std::strcmp(*isa, wanted)) return true;
  return false;
}

void check_refused() {
  refuse_permission();
  check("amx_bf16 is listed without permission", !is_listed("amx_bf16"));
  check("amx_bf16 is chosen without permission", std::strcmp(cpu::isa(), "amx_bf16") != 0);
  check("amx_bf16 can be forced without permission", !cpu::force_isa("amx_bf16"));
  check("refused permission is not reported", cpu::amx_state() != cpu::AmxState::kUsable);
  std::printf("AMX %s, %s is used\n",
              cpu::amx_state() == cpu::AmxState::kRefused ? "refused" : "absent", cpu::isa());
  Multiplication().result();
}

void check_preempted(const char* isa, double seconds) {
  cpu::force_isa(isa);
  Multiplication multiplication;
  const std::vector<uint16_t> want = multiplication.result();
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::atomic<int64_t> done{0};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 3 * std::max(1u, std::thread::hardware_concurrency()); ++i)
    threads.emplace_back([&] {
      do {
        check(std::string(isa) + ": other bits under preemption", multiplication.result() == want);
        ++done;
      } while (std::chrono::steady_clock::now() < end && failures == 0);
    });
  for (std::thread& thread : threads) thread.join();
  std::printf("%s: %lld times the same bits in %zu threads\n", isa, (long long)done.load(),
              threads.size());
  if (!std::strcmp(isa, "amx_bf16")) check_configuration(multiplication);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !std::strcmp(argv[1], "refused")) {
    check_refused();
  } else {
    const char* given = std::getenv("DSMOE_TEST_SECONDS");
    const double seconds = given ? std::atof(given) : 3;
    int count = 0;
    for (const char* const* isa = cpu::isas(); *isa; ++isa) ++count;
    const bool has_tiles = is_listed("amx_bf16");  // then most of the time is theirs
    for (const char* const* isa = cpu::isas(); *isa; ++isa) {
      const bool is_tiles = !std::strcmp(*isa, "amx_bf16");
      check_preempted(*isa, is_tiles ? seconds * 0.8 : seconds * (has_tiles ? 0.2 : 1) / count);
    }
  }
  std::printf(failures ? "%d FAILED\n" : "all passed\n", failures.load());
  return failures != 0;
}

#include "binding/team.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>

namespace dsmoe::binding {
namespace {

// at::parallel_for cuts its range evenly over as many threads as it can get, all running at once,
// and calls the body once a thread; it may get fewer threads than it was asked for (inside another
// parallel region: one). The kernels have barriers, so they must know the real number. It follows
// from the length of the first piece: the range is long (1024 units a thread), so that pieces are
// never empty and their number is exact.
void parallel(void*, int max_size, void (*body)(void*, int, int), void* arg) {
  constexpr int64_t kUnits = 1024;
  const int64_t range = max_size * kUnits;
  std::atomic<int64_t> piece{0};
  torch::stable::parallel_for(0, range, kUnits, [&](int64_t begin, int64_t end) {
    if (begin == 0) piece.store(end, std::memory_order_release);
    int64_t length = 0;
    while ((length = piece.load(std::memory_order_acquire)) == 0) {
    }
    body(arg, static_cast<int>(begin / length), static_cast<int>((range + length - 1) / length));
  });
}

}  // namespace

cpu::Team torch_team() {
  return {static_cast<int>(torch::stable::get_num_threads()), nullptr, parallel};
}

}  // namespace dsmoe::binding

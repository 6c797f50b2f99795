// Splits independent rows over the caller's threads (see Team in kernels.h). For kernels with
// phases use barriers.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace dsmoe::cpu {

// Rows are cut into num_chunks fixed chunks, whatever the number of threads: results that depend on
// the cut (partial counts) are then the same for any team. f(chunk, begin, end).
template <class F>
void for_each_chunk(const Team& team, int num_chunks, int64_t rows, const F& f) {
  struct Context {
    const F& f;
    int num_chunks;
    int64_t rows;
  } context{f, num_chunks, rows};
  auto body = [](void* arg, int thread, int size) {
    const auto& c = *static_cast<Context*>(arg);
    for (int64_t chunk = thread; chunk < c.num_chunks; chunk += size) {
      c.f(static_cast<int>(chunk), chunk * c.rows / c.num_chunks,
          (chunk + 1) * c.rows / c.num_chunks);
    }
  };
  const int threads = std::min(team.max_size, num_chunks);
  if (threads <= 1) {
    body(&context, 0, 1);
  } else {
    team.parallel(team.context, threads, body, &context);
  }
}

// One chunk per thread, but none smaller than grain elements: a fork costs about as much as 10
// thousand of them.
inline int chunk_count(const Team& team, int64_t elements, int64_t grain = 16384) {
  return static_cast<int>(std::clamp<int64_t>(elements / grain, 1, team.max_size));
}

}  // namespace dsmoe::cpu

#include "cpu/team.h"

#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>

namespace dsmoe::cpu {
namespace {

struct alignas(64) Block {
  size_t bytes;  // of the whole block, this header included
};

constexpr size_t kHuge = size_t{2}
                         << 20;  // from here on ask for huge pages: fewer faults and TLB misses
constexpr size_t kKept = size_t{256} << 20;  // larger blocks are not kept
constexpr int kSlots = 4;  // blocks kept between calls; concurrent callers may allocate more
std::atomic<Block*> slots[kSlots];

}  // namespace

void prefer_huge_pages(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void* workspace_acquire(size_t bytes) {
  const size_t needed = bytes + sizeof(Block);
  for (auto& slot : slots) {
    Block* block = slot.exchange(nullptr, std::memory_order_acq_rel);
    if (block && block->bytes >= needed) return block + 1;
    std::free(slot.exchange(block, std::memory_order_acq_rel));
  }
  const size_t alignment = needed >= kHuge ? kHuge : 64;
  const size_t rounded = (needed + alignment - 1) / alignment * alignment;
  Block* block = static_cast<Block*>(std::aligned_alloc(alignment, rounded));
  if (!block) return nullptr;
  prefer_huge_pages(block, rounded);
  block->bytes = rounded;
  return block + 1;
}

void workspace_release(void* workspace) {
  if (!workspace) return;
  Block* block = static_cast<Block*>(workspace) - 1;
  if (block->bytes > kKept) return std::free(block);
  for (auto& slot :
       slots) {  // the small ones give way, and so the slots end up holding what is needed most
    Block* other = slot.exchange(block, std::memory_order_acq_rel);
    if (!other) return;
    block = other;
    if (&slot == &slots[kSlots - 1]) std::free(block);
  }
}

void barrier_wait(Barrier& barrier, int size) {
  if (size == 1) return;
  const int32_t generation = __atomic_load_n(&barrier.generation, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) == size) {
    __atomic_store_n(&barrier.arrived, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&barrier.generation, generation + 1, __ATOMIC_RELEASE);
    return;
  }
  for (int spins = 0; __atomic_load_n(&barrier.generation, __ATOMIC_ACQUIRE) == generation;
       ++spins) {
    if (spins < 4000) {  // about 50 microseconds
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      sched_yield();
    }
  }
}

int64_t draw(int64_t& counter) {
  return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
}

void run_team(const Team& team, int max_size, void (*body)(void* arg, int thread, int size),
              void* arg) {
  if (max_size <= 1 || team.max_size <= 1) {
    body(arg, 0, 1);
  } else {
    team.parallel(team.context, max_size < team.max_size ? max_size : team.max_size, body, arg);
  }
}

}  // namespace dsmoe::cpu

// Weight gradients are new memory in every step. malloc gives blocks of their size back to the system, and
// fresh pages cost a training step at T = 128 a third of its time (bf16, H 2048, I 5632: 17 thousand page
// faults, 16 ms beside 37): so blocks are kept, and mapped by huge pages where they are not.
//
// The slots are atomic pointers, as in cpu/team.cpp: no lock that a fork could leave behind.
#include "binding/kept_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>

#include "binding/direct_empty.h"
#include "cpu/team.h"

// In torch's stable ABI from 2.11 on; null in 2.10, which this library loads in as well.
extern "C" [[gnu::weak, gnu::visibility("default")]] AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* ret, int32_t layout,
    const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace dsmoe::binding {
namespace {

struct alignas(64) Block {
  size_t bytes;  // of the whole mapping, this header included
};

constexpr size_t kSmallest = size_t{1} << 20;  // below, malloc keeps what it gets
constexpr size_t kPage = size_t{64} << 10;     // a multiple of every system's
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kSlots = 256;
std::atomic<Block*> slots[kSlots];
std::atomic<size_t> newest{0}, kept_bytes{0};

// An eighth of the memory that this process may use: the gradients of a model of 1.1 billion
// parameters, 1.5 GB in its feed-forward layers, stay on a machine of 16 GB.
size_t most_bytes() {
  static const size_t most = [] {
    const char* chosen = std::getenv("DSMOE_KEPT_BYTES");
    if (chosen && *chosen)  // a number: ops.py has refused anything else
      return static_cast<size_t>(std::strtoull(chosen, nullptr, 10));
    size_t memory =
        static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
    // Of control groups: containers see all of the machine's memory, but may use less.
    for (const char* path :
         {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
      size_t limit = 0;
      if (std::ifstream(path) >> limit) memory = std::min(memory, limit);
    }
    return memory / 8;
  }();
  return most;
}

// At a multiple of kHugePage, so that the system can back all but the end of it by huge pages.
Block* map(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (start + kHugePage - 1) / kHugePage * kHugePage;
  if (begin > start) munmap(memory, begin - start);
  if (start + kHugePage > begin)
    munmap(reinterpret_cast<void*>(begin + bytes), start + kHugePage - begin);
  cpu::prefer_huge_pages(reinterpret_cast<void*>(begin), bytes);
  Block* block = reinterpret_cast<Block*>(begin);
  block->bytes = bytes;
  return block;
}

void unmap(Block* block) {
  munmap(block, block->bytes);
}

void drop(Block* block) {
  if (!block) return;
  kept_bytes.fetch_sub(block->bytes);
  unmap(block);
}

// A ring: the newest block takes the place of the oldest, and more of the oldest go if there are too
// many bytes.
void keep(Block* block) {
  if (block->bytes > most_bytes()) return unmap(block);
  kept_bytes.fetch_add(block->bytes);
  const size_t at = newest.fetch_add(1) + 1;
  drop(slots[at % kSlots].exchange(block));
  for (size_t i = 1; i < kSlots && kept_bytes.load() > most_bytes(); ++i)
    drop(slots[(at + i) % kSlots].exchange(nullptr));
}

// A new block, if need be in place of all that are kept.
Block* map_in_need(size_t bytes) {
  Block* block = map(bytes);
  if (block) return block;
  for (auto& slot : slots) drop(slot.exchange(nullptr));
  return map(bytes);
}

// The newest kept block of that size, or a new one. A block is looked at by whoever holds it alone.
Block* acquire(size_t bytes) {
  const size_t at = newest.load() + kSlots;
  for (size_t i = 0; i < kSlots; ++i) {
    auto& slot = slots[(at - i) % kSlots];
    Block* block = slot.exchange(nullptr);
    if (!block) continue;
    if (block->bytes == bytes) {
      kept_bytes.fetch_sub(bytes);
      return block;
    }
    Block* none = nullptr;
    if (!slot.compare_exchange_strong(none, block)) drop(block);
  }
  return map_in_need(bytes);
}

bool should_map(const Tensor& like, size_t bytes) {
  return torch_from_blob && like.is_cpu() && bytes >= kSmallest;
}

// A tensor in a block for so many bytes, which goes to `release` once torch lets go of it.
template <Block* (*make)(size_t), void (*release)(Block*)>
Tensor tensor_in_block(size_t bytes, const DenseShape& shape, int32_t dtype) {
  Block* block = make((bytes + sizeof(Block) + kPage - 1) / kPage * kPage);
  check(block != nullptr, "out of memory: ", bytes, " bytes.");
  AtenTensorHandle tensor = nullptr;
  // Should this fail the block is lost: it may have been released with the tensor that torch had begun.
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block + 1, shape.dims, shape.sizes.data(), shape.strides.data(), 0, dtype,
      aoti_torch_device_type_cpu(), -1, &tensor, aoti_torch_layout_strided(), nullptr, 0,
      [](void* data, void*) { release(static_cast<Block*>(data) - 1); }, nullptr));
  return Tensor(tensor);
}

}  // namespace

Tensor kept_empty(const Tensor& like, const DenseShape& shape) {
  size_t bytes = static_cast<size_t>(dtype_size(kernel_dtype(like, "like")));
  for (int64_t d = 0; d < shape.dims; ++d) bytes *= static_cast<size_t>(shape.sizes[d]);
  if (!should_map(like, bytes)) return direct_empty(like, shape);
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return tensor_in_block<acquire, keep>(bytes, shape, dtype);
}

Tensor mapped_bytes(const Tensor& like, int64_t bytes) {
  if (!should_map(like, static_cast<size_t>(bytes)))
    return direct_empty(like, {bytes}, ScalarType::Byte);
  return tensor_in_block<map_in_need, unmap>(static_cast<size_t>(bytes), {bytes},
                                             aoti_torch_dtype_uint8());
}

}  // namespace dsmoe::binding

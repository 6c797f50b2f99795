// Tensors whose memory stays here between calls instead of going back to the system.
#pragma once

#include "binding/checks.h"

namespace dsmoe::binding {

// Like direct_empty. On the CPU, blocks from 1 MiB on are mapped by huge pages and, once torch lets go
// of them, kept for the next tensor of the same size: at most an eighth of the memory (or
// DSMOE_KEPT_BYTES) and 256 blocks in all, beyond which the oldest are unmapped. Such a tensor cannot
// be resized in place.
Tensor kept_empty(const Tensor& like, std::initializer_list<int64_t> shape);

}  // namespace dsmoe::binding

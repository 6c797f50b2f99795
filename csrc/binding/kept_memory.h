// Tensors in memory that is mapped by huge pages here; some of it stays here between calls.
#pragma once

#include "binding/direct_empty.h"

namespace dsmoe::binding {

// Like direct_empty. On the CPU, blocks from 1 MiB on are mapped by huge pages and, once torch lets go
// of them, kept for the next tensor of the same size: at most an eighth of the memory (or
// DSMOE_KEPT_BYTES) and 256 blocks in all, beyond which the oldest are unmapped. Such a tensor cannot
// be resized in place.
Tensor kept_empty(const Tensor& like, const DenseShape& shape);

// uint8 [bytes], beside `like`: mapped in the same way, but given back to the system. malloc's memory is partly in
// small pages where it was used before, whatever it is advised then. It cannot be resized in place either.
Tensor mapped_bytes(const Tensor& like, int64_t bytes);

}  // namespace dsmoe::binding

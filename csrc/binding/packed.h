// Packed weights as a tensor: bytes that one instruction set's kernels read, and a stamp that says so.
#pragma once

#include "binding/checks.h"

namespace dsmoe::binding {

// Sets packed and packed_format of p, all else of which is filled in; an error unless they fit.
void check_packed(const Tensor& packed, ExpertMlpParams& p);

}  // namespace dsmoe::binding

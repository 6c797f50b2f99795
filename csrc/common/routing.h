// The routing rule, once, for host and device: how a logit becomes a score, when a pair is active,
// and the factor that rescales a token's gates.
#pragma once

#include <cmath>

#include "common/macros.h"

namespace dsmoe {

template <class T>
DSMOE_HOST_DEVICE inline T sigmoid(T z) {
  return T(1) / (T(1) + std::exp(-z));
}

// Strict, and written so that NaN is active: a broken router must show in the output, not vanish
// from it.
template <class T>
DSMOE_HOST_DEVICE inline bool above(T score, T threshold) {
  return !(score <= threshold);
}

// Order of ranks: descending, NaN first, ties by index (the caller compares equal elements in index
// order).
template <class T>
DSMOE_HOST_DEVICE inline bool ranks_before(T a, T b) {
  return a > b || (a != a && b == b);
}

// E/k for equal sizes. The factor is 1 where no routed expert is active: the router's gradient
// stays of normal size.
template <class T>
DSMOE_HOST_DEVICE inline T rescale_factor(T routed_size, T active_size) {
  return active_size > T(0) ? routed_size / active_size : T(1);
}

}  // namespace dsmoe

// How pack_weights lays out an expert:
//
//   [gate and up: panels of one register of gate and one of up columns, K = H][down: panels, K = S]
//
// SwiGLU finds its two operands side by side. Either half is cut into blocks of K:
//   [K / block][panel][block][kColumns][kPair]
// With a few tokens the panels of one block are one stream, and meanwhile the rows of A that it is
// multiplied with, 12 x 512 bytes at most, stay in the first-level cache. Had a panel all of K, every
// panel would drive them out (36 KiB at K = 576): six rows took 25 instead of 33 GB/s (Zen 4). Beyond
// kLongSteps a block is all of K: the ends of blocks cost more than they brought (K = 2048). A matrix of
// one or two panels keeps all of K too: it reads rows of A only once or twice.
#pragma once

#include "simd.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

constexpr int64_t kBlockSteps = 128, kLongSteps = 512;

// One of the halves. In elements of T.
template <class T>
struct PackedPanels {
  static constexpr int64_t kStep = kColumns<T> * Compute<T>::kPair;
  int64_t terms, panels;  // terms: K
  int64_t steps() const { return ceil_div(terms, Compute<T>::kPair); }
  int64_t block_steps() const {
    if (panels > 2 && steps() <= kLongSteps) return kBlockSteps;
    return max_of<int64_t>(steps(), 1);  // no steps are no blocks, and nothing to divide by
  }
  int64_t block_size() const { return block_steps() * kStep; }
  int64_t blocks() const { return ceil_div(steps(), block_steps()); }
  int64_t whole_blocks() const { return steps() / block_steps(); }
  int64_t first_term(int64_t block) const { return block * block_steps() * Compute<T>::kPair; }
  int64_t terms_of(int64_t block) const {
    return min_of<int64_t>(terms - first_term(block), block_steps() * Compute<T>::kPair);
  }
  int64_t steps_of(int64_t block) const {
    return min_of(steps() - block * block_steps(), block_steps());
  }
  int64_t start(int64_t block, int64_t panel) const {
    return block * panels * block_size() + panel * steps_of(block) * kStep;
  }
  int64_t panel() const { return steps() * kStep; }
  int64_t size() const { return panels * panel(); }
};

template <class T>
struct PackedLayout {
  int64_t hidden;
  int64_t hidden_panel() const {
    return ceil_div(hidden, Compute<T>::kPair) * PackedPanels<T>::kStep;
  }
  PackedPanels<T> gate_up(int64_t size) const { return {hidden, ceil_div(size, kLanes<T>)}; }
  PackedPanels<T> down(int64_t size) const { return {size, ceil_div(hidden, kColumns<T>)}; }
  int64_t down_start(int64_t size) const { return gate_up(size).size(); }
  int64_t expert(int64_t size) const { return down_start(size) + down(size).size(); }
};

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

// How pack_quantized lays out weights that are codes of 8 or 4 bits (QuantFormat in kernels.h):
//
//   [scales of down's columns][expert][expert]..
//   an expert:  [gate and up: panels, K = H][scales of neurons][down: panels, K = S]
//
// Scales of columns and neurons are there unless groups have scales. They cost nothing: gate's and up's go on the
// sums before SwiGLU, down's on the sums of all experts as they are rounded to y.
// A panel is two registers of columns, as in packed_layout.h, and one stream from its first byte to its last:
//   [K / block][lines of codes][2 registers]   kDotTerms terms of K of each column side by side, a byte each;
//                                              of 4 bits two such steps, in the low and the high halves
//             [scales][2 registers] fp16       of groups
//             [mins][2 registers] fp16         w = scale code + min
// A block is a group, or the 64 terms after which sums of integers go on in fp32 anyway; a last one of fewer
// terms has as many lines as they need. Codes are stored with kZero added, so that they have no sign.
//   scales of columns   [H] fp32
//   scales of neurons   [S / kLanes][gate, up][kLanes] fp32
#pragma once

#include "kernels.h"
#include "simd.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

// How many terms of K one instruction multiplies and adds in each dword (dot, in quantized_tile.h).
#if defined(__AVX512VNNI__)
constexpr int kDotTerms = 4;
#else
constexpr int kDotTerms = 2;
#endif
constexpr int kCodeLanes = kLanes<float>, kLineBytes = kDotTerms * kCodeLanes;
constexpr int64_t kCodeBlock = 64;
template <int Bits>
constexpr int kZero = 1 << (Bits - 1);

struct QuantizedPanels {
  int64_t terms, panels;
  QuantFormat format;
  int64_t block_terms() const { return format.group_size == 32 ? 32 : kCodeBlock; }
  int64_t blocks() const { return ceil_div(terms, block_terms()); }
  int64_t terms_of(int64_t block) const {
    return min_of(terms - block * block_terms(), block_terms());
  }
  int64_t lines(int64_t of_terms) const {
    return ceil_div(of_terms, kDotTerms * (format.bits == 4 ? 2 : 1));
  }
  int64_t code_bytes(int64_t of_terms) const { return lines(of_terms) * 2 * kLineBytes; }
  int64_t number_bytes() const {
    const int64_t numbers = format.group_size ? (format.has_min ? 2 : 1) : 0;
    return numbers * 2 * kCodeLanes * int64_t(sizeof(fp16));
  }
  int64_t block_bytes(int64_t of_terms) const { return code_bytes(of_terms) + number_bytes(); }
  int64_t block_start(int64_t block) const { return block * block_bytes(block_terms()); }
  int64_t panel_bytes() const {
    const int64_t whole = terms / block_terms(), rest = terms % block_terms();
    return round_up(block_start(whole) + (rest ? block_bytes(rest) : 0), 64);
  }
  int64_t size() const { return panels * panel_bytes(); }
};

struct QuantizedLayout {
  int64_t hidden;
  QuantFormat format;
  QuantizedPanels gate_up(int64_t size) const {
    return {hidden, ceil_div(size, kCodeLanes), format};
  }
  QuantizedPanels down(int64_t size) const {
    return {size, ceil_div(hidden, 2 * kCodeLanes), format};
  }
  int64_t scales_start(int64_t size) const { return gate_up(size).size(); }
  int64_t scales_bytes(int64_t size) const {
    return format.group_size ? 0 : round_up(gate_up(size).panels * 2 * kCodeLanes * 4, 64);
  }
  // Before the first expert: of down's columns.
  int64_t column_scales_bytes() const {
    return format.group_size ? 0 : down(0).panels * 2 * kCodeLanes * 4;
  }
  int64_t down_start(int64_t size) const { return scales_start(size) + scales_bytes(size); }
  int64_t expert(int64_t size) const { return down_start(size) + down(size).size(); }
};

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

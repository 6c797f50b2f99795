// Experts in token order: fine experts that many tokens use take all tokens of a block, with zeros for those that
// do not use them, and K of the column pass goes through several experts at once.
//
//   row pass      x in blocks of tiles, gathered once for all of them; a is 0 where a token's gate is 0
//   column pass   Y[T, H] += [a_1 a_2 ...] [Wd_1; Wd_2; ...]     K: up to kGroupTerms neurons of several experts
//
// Tiles want rows gathered and sums added to Y. Per row that takes a fine expert as long as a large one, while
// multiplying by zeros takes as long as the expert is wide.
//
// A zero times an infinite or missing weight is no number, and a token must not see weights of an expert that it
// does not use: an expert with such weights in a panel is packed as zeros there and added apart, in plain code.
#pragma once

#include "column_pass.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

// A panel of B goes by whole.
constexpr int64_t kGroupTerms = 2 * kWholeSteps;
// Multiplying so many neurons by zeros takes as long as gathering a row and adding it.
constexpr int64_t kOrderTerms = 128;

template <class T>
constexpr bool pays_in_order(int64_t rows, int64_t num_tokens, int64_t size) {
  return in_tiles<T>(rows) && (num_tokens - rows) * size <= kOrderTerms * rows;
}

// Where an expert's neurons lie in the rows of a, beside those of its group: experts in token order that follow one
// another. Every other expert is a group by itself.
struct Place {
  bool in_order;
  int32_t leader;             // the group's first expert
  int64_t first_term, terms;  // of the group's
};

template <class T>
static void place_groups(int num_experts, const int32_t* expert_offsets, Place* places) {
  int32_t leader = -1;
  for (int32_t e = 0; e < num_experts; ++e) {
    const int64_t size = expert_offsets[e + 1] - expert_offsets[e];
    const int64_t terms = round_up(size, kLanes<T>);
    Place& place = places[e];
    if (!place.in_order) {
      place = {false, e, 0, size};
      continue;
    }
    if (leader < 0 || places[leader].terms + terms > kGroupTerms) {
      leader = e;
      places[leader].terms = 0;
    }
    place.leader = leader;
    place.first_term = places[leader].terms;
    places[leader].terms += terms;
  }
  for (int e = 0; e < num_experts; ++e) places[e].terms = places[places[e].leader].terms;
}

// One expert's k rows of a group's B: packed panels, codes, or a [k, H] matrix.
template <class T>
struct Part {
  int64_t k, first_term;
  const CType<T>* gates;  // token t has the expert if gates[t * gate_stride] != 0
  int64_t gate_stride;
  const T* packed = nullptr;
  const char* codes = nullptr;
  QuantizedPanels code_panels = {};
  const T* matrix = nullptr;
  int64_t row_stride = 0, column_stride = 1;  // if the latter is not 1, the former is

  int64_t steps() const { return round_up(k, kLanes<T>) / Compute<T>::kPair; }

  // A panel of it, padded with zeros to whole registers.
  void pack(int64_t hidden, int64_t panel, T* out) const {
    constexpr int64_t kN = kColumns<T>, kStep = PackedPanels<T>::kStep;
    const int64_t used = ceil_div(k, Compute<T>::kPair);
    if (packed) {
      const PackedPanels<T> b = PackedLayout<T>{hidden}.down(k);
      for (int64_t i = 0; i < b.blocks(); ++i)
        memcpy(out + i * b.block_size(), packed + b.start(i, panel),
               size_t(b.steps_of(i) * kStep) * sizeof(T));
    } else if (codes) {
      if constexpr (kHasCodes<T>)
        dequantize(codes + panel * code_panels.panel_bytes(), code_panels, 0, code_panels.blocks(),
                   out);
    } else if (column_stride != 1) {
      pack_rows_of_panels(matrix, column_stride, k, 0, used, panel * kN, hidden, 1, out);
    } else {
      pack_columns([&](int64_t i) { return matrix + i * row_stride; }, k, 0, used, panel * kN,
                   hidden, 1, out);
    }
    memset(out + used * kStep, 0, size_t((steps() - used) * kStep) * sizeof(T));
  }
};

// Whether all of count numbers, whole registers of them, are: an exponent of ones is infinite or no number.
DSMOE_INLINE bool is_finite(const bf16* from, int64_t count) {
  constexpr uint32_t kLow = 0x7f80u, kHigh = kLow << 16;
  VecU32 bad = {};
  for (int64_t i = 0; i < count; i += 2 * kLanes<float>) {
    const VecU32 pairs = load_raw<VecU32>(from + i);
    bad |= VecU32((pairs & kLow) == kLow) | VecU32((pairs & kHigh) == kHigh);
  }
  uint32_t any = 0;
  for (int i = 0; i < kLanes<float>; ++i) any |= bad[i];
  return any == 0;
}

// Adds a group's products to a chunk of columns, while the next panel of B is packed into the other half of the
// scratch memory, a share after every few rows.
template <class T>
class OrderedColumns {
 public:
  // a: num_tokens rows of `terms`, in blocks.
  OrderedColumns(const AType<T>* a, int64_t num_tokens, int64_t terms, const Part<T>* parts,
                 int64_t num_parts, int64_t hidden, T* scratch)
      : a_(a),
        num_tokens_(num_tokens),
        terms_(terms),
        parts_(parts),
        num_parts_(num_parts),
        hidden_(hidden),
        scratch_(scratch) {}

  // T elements of scratch.
  static int64_t scratch_size(int64_t terms) { return 2 * half(terms); }

  // sums: of the first token and of panel_begin's first column.
  void add(int64_t panel_begin, int64_t panel_end, CType<T>* sums) {
    const int64_t stride = (panel_end - panel_begin) * kColumns<T>;
    bool is_whole = pack(panel_begin, 0, num_parts_, scratch_);
    for (int64_t panel = panel_begin; panel < panel_end; ++panel, sums += kColumns<T>) {
      const bool is_odd = (panel - panel_begin) % 2;
      T *b = scratch_ + is_odd * half(terms_), *next = scratch_ + !is_odd * half(terms_);
      TileArgs<T> args;
      args.b = b;
      args.steps = terms_ / Compute<T>::kPair;
      const int64_t num_next = panel + 1 < panel_end ? num_parts_ : 0;
      int64_t packed = 0;
      bool next_is_whole = true;
      for_each_block<1>(args, a_, block_size(terms_), num_tokens_,
                        [&](int64_t first, int count, const CType<T>(*block)[kColumns<T>]) {
                          const auto token = [&](int r) { return first + r; };
                          add_rows<T>(block, count, token, sums, stride);
                          const int64_t end = num_next * (first + count) / num_tokens_;
                          next_is_whole &= pack(panel + 1, packed, end, next);
                          packed = end;
                        });
      if (!is_whole) add_apart(panel, b, sums, stride);
      is_whole = next_is_whole;
    }
  }

 private:
  static int64_t half(int64_t terms) { return terms / Compute<T>::kPair * PackedPanels<T>::kStep; }

  // Whether all weights are finite; those of parts which have others are left out.
  bool pack(int64_t panel, int64_t begin, int64_t end, T* b) const {
    bool is_whole = true;
    for (int64_t i = begin; i < end; ++i) {
      T* out = b + half(parts_[i].first_term);
      parts_[i].pack(hidden_, panel, out);
      const int64_t size = parts_[i].steps() * PackedPanels<T>::kStep;
      if (is_finite(out, size)) continue;
      memset(out, 0, size_t(size) * sizeof(T));
      is_whole = false;
    }
    return is_whole;
  }

  // What pack() left out, for the tokens that have it. room: a panel.
  void add_apart(int64_t panel, T* room, CType<T>* sums, int64_t stride) const {
    constexpr int64_t kPair = Compute<T>::kPair;
    for (int64_t i = 0; i < num_parts_; ++i) {
      const Part<T>& part = parts_[i];
      part.pack(hidden_, panel, room);
      if (is_finite(room, part.steps() * PackedPanels<T>::kStep)) continue;
      for (int64_t t = 0; t < num_tokens_; ++t) {
        if (part.gates[t * part.gate_stride] == 0) continue;
        for (int64_t n = 0; n < part.k; ++n) {
          const float a = widen(a_[blocked_at(t, part.first_term + n, terms_)]);
          const T* row = room + n / kPair * PackedPanels<T>::kStep + n % kPair;
          for (int64_t c = 0; c < kColumns<T>; ++c)
            sums[t * stride + c] += a * widen(row[c * kPair]);
        }
      }
    }
  }

  const AType<T>* a_;
  int64_t num_tokens_, terms_;
  const Part<T>* parts_;
  int64_t num_parts_, hidden_;
  T* scratch_;
};

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

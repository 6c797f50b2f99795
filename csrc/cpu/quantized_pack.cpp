// pack_quantized: codes and scales into panels. Layout: quantized_layout.h.
#include "expert_mlp_isa.h"
#include "quantized_layout.h"
#include "team.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {
namespace {

// A matrix of an expert as B has it: element (term of K, column) and the numbers of (group of K, column).
struct CodeMatrix {
  const int8_t* codes;
  const fp16 *scales, *mins;
  int64_t term_stride, column_stride, group_stride, column_number_stride;
};

// One register of columns, `columns` of which exist, into a panel; w: which of its two.
void pack_columns_of_codes(const CodeMatrix& m, int64_t columns, const QuantizedPanels& b, int w,
                           char* panel) {
  const int steps = b.format.bits == 4 ? 2 : 1, zero = 1 << (b.format.bits - 1);
  const int line_terms = kDotTerms * steps;
  for (int64_t i = 0; i < b.blocks(); ++i) {
    const int64_t first = i * b.block_terms(), terms = b.terms_of(i);
    char* out = panel + b.block_start(i);
    for (int64_t line = 0; line < b.lines(terms); ++line) {
      auto* to = reinterpret_cast<uint8_t*>(out + (2 * line + w) * kLineBytes);
      for (int64_t c = 0; c < kCodeLanes; ++c)
        for (int j = 0; j < kDotTerms; ++j) {
          int byte = 0;
          for (int step = 0; step < steps; ++step) {
            const int64_t term = line * line_terms + step * kDotTerms + j;
            const bool exists = c < columns && term < terms;
            const int code =
                exists ? m.codes[(first + term) * m.term_stride + c * m.column_stride] : 0;
            byte |= (code + zero) << (4 * step);
          }
          to[c * kDotTerms + j] = uint8_t(byte);
        }
    }
    if (!b.format.group_size) continue;
    auto* numbers = reinterpret_cast<fp16*>(out + b.code_bytes(terms));
    const int64_t group = first / b.format.group_size;
    for (int part = 0; part < (b.format.has_min ? 2 : 1); ++part)
      for (int64_t c = 0; c < kCodeLanes; ++c)
        numbers[(2 * part + w) * kCodeLanes + c] =
            c < columns
                ? (part ? m.mins : m.scales)[group * m.group_stride + c * m.column_number_stride]
                : fp16{};
  }
}

struct Pack {
  const PackQuantizedParams& p;
  int64_t next = 0;
  int64_t size(int e) const { return p.expert_offsets[e + 1] - p.expert_offsets[e]; }

  const fp16* numbers(const void* of_groups, int64_t offset) const {
    return p.format.group_size && of_groups ? (const fp16*)of_groups + offset : nullptr;
  }
  // Columns are neurons: rows of the matrix.
  CodeMatrix neurons(const QuantizedMatrix& m, int64_t first) const {
    const int64_t H = p.hidden_size,
                  groups = p.format.group_size ? ceil_div(H, p.format.group_size) : 0;
    return {m.codes + first * H,
            numbers(m.scales, first * groups),
            numbers(m.mins, first * groups),
            1,
            H,
            1,
            groups};
  }
  void expert(int e, int64_t first_group, char* out) const {
    const QuantizedLayout layout{p.hidden_size, p.format};
    const int64_t S = size(e), H = p.hidden_size, first = p.expert_offsets[e];
    if (layout.expert(S) == 0) return;  // nothing may lie there, not even memory
    memset(out, 0, size_t(layout.expert(S)));
    const QuantizedPanels gate_up = layout.gate_up(S), down = layout.down(S);
    for (int64_t i = 0; i < gate_up.panels; ++i) {
      char* panel = out + i * gate_up.panel_bytes();
      const int64_t row = i * kCodeLanes, columns = min_of<int64_t>(S - row, kCodeLanes);
      pack_columns_of_codes(neurons(p.gate_proj, first + row), columns, gate_up, 0, panel);
      pack_columns_of_codes(neurons(p.up_proj, first + row), columns, gate_up, 1, panel);
      if (p.format.group_size) continue;
      auto* scales = reinterpret_cast<float*>(out + layout.scales_start(S)) + i * 2 * kCodeLanes;
      const QuantizedMatrix* matrices[] = {&p.gate_proj, &p.up_proj};
      for (int part = 0; part < 2; ++part)
        memcpy(scales + part * kCodeLanes, (const float*)matrices[part]->scales + first + row,
               size_t(columns) * sizeof(float));
    }
    const QuantizedMatrix& m = p.down_proj_t;
    for (int64_t i = 0; i < down.panels; ++i)
      for (int w = 0; w < 2; ++w) {
        const int64_t column = (2 * i + w) * kCodeLanes;
        const CodeMatrix columns{m.codes + first * H + column,
                                 numbers(m.scales, first_group * H + column),
                                 numbers(m.mins, first_group * H + column),
                                 H,
                                 1,
                                 H,
                                 1};
        pack_columns_of_codes(columns, min_of<int64_t>(H - column, kCodeLanes), down, w,
                              out + layout.down_start(S) + i * down.panel_bytes());
      }
  }
  void run() {
    for (int64_t e; (e = draw(next)) < p.num_experts;) {
      char* out = (char*)p.packed + QuantizedLayout{p.hidden_size, p.format}.column_scales_bytes();
      int64_t first_group = 0;
      for (int i = 0; i < e; ++i) {
        out += QuantizedLayout{p.hidden_size, p.format}.expert(size(i));
        if (p.format.group_size) first_group += ceil_div(size(i), p.format.group_size);
      }
      expert(int(e), first_group, out);
    }
  }
};

}  // namespace

int64_t quantized_bytes(const PackQuantizedParams& p) {
  int64_t bytes = QuantizedLayout{p.hidden_size, p.format}.column_scales_bytes();
  for (int e = 0; e < p.num_experts; ++e)
    bytes += QuantizedLayout{p.hidden_size, p.format}.expert(p.expert_offsets[e + 1] -
                                                             p.expert_offsets[e]);
  return bytes;
}

Status pack_quantized(const PackQuantizedParams& p, const Team& team) {
  Pack work{p};
  prefer_huge_pages(p.packed, size_t(quantized_bytes(p)));
  if (const int64_t bytes = QuantizedLayout{p.hidden_size, p.format}.column_scales_bytes()) {
    memset(p.packed, 0, size_t(bytes));
    memcpy(p.packed, p.down_proj_t.scales, size_t(p.hidden_size) * sizeof(float));
  }
  run_team(team, team.max_size, [](void* arg, int, int) { ((Pack*)arg)->run(); }, &work);
  return Status::kOk;
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

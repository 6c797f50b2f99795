// pack_weights and this ISA's table of entry points. Layout: packed_layout.h; experts one after another.
#include "expert_mlp_isa.h"
#include "pack.h"
#include "packed_layout.h"
#include "passes.h"
#include "team.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {
namespace {

template <class T>
int64_t packed_elements(const PackParams& p) {
  int64_t elements = 0;
  for (int e = 0; e < p.num_experts; ++e)
    elements +=
        PackedLayout<T>{p.hidden_size}.expert(p.expert_offsets[e + 1] - p.expert_offsets[e]);
  return elements;
}

// Experts are drawn by threads; packing happens once and is bound by memory.
template <class T>
struct Pack {
  const PackParams& p;
  int64_t next = 0;

  void expert(int e, T* out) const {
    const PackedLayout<T> layout{p.hidden_size};
    const int64_t size = p.expert_offsets[e + 1] - p.expert_offsets[e], H = p.hidden_size;
    const T* gate = expert_start((const T*)p.gate_proj, p.gate_up, p.expert_offsets, e);
    const T* up = expert_start((const T*)p.up_proj, p.gate_up, p.expert_offsets, e);
    const T* down = expert_start((const T*)p.down_proj_t, p.down, p.expert_offsets, e);
    const PackedPanels<T> gate_up = layout.gate_up(size), columns = layout.down(size);
    for (int64_t i = 0; i < gate_up.panels; ++i) {
      const int64_t row = i * kLanes<T>, valid = size - row;
      for (int64_t b = 0; b < gate_up.blocks(); ++b) {
        const int64_t from = row * p.gate_up.neuron + gate_up.first_term(b);
        pack_rows(gate + from, valid, up + from, valid, p.gate_up.neuron, gate_up.terms_of(b),
                  out + gate_up.start(b, i));
      }
    }
    out += layout.down_start(size);
    for (int64_t b = 0; b < columns.blocks(); ++b) {
      const T* first = down + columns.first_term(b) * p.down.neuron;
      T* to = out + columns.start(b, 0);
      if (p.down.hidden == 1)
        pack_columns([&](int64_t i) { return first + i * p.down.neuron; }, columns.terms_of(b), 0,
                     columns.steps_of(b), 0, H, columns.panels, to);
      else
        pack_rows_of_panels(first, p.down.hidden, columns.terms_of(b), 0, columns.steps_of(b), 0, H,
                            columns.panels, to);
    }
  }
  void run() {
    for (int64_t e; (e = draw(next)) < p.num_experts;) {
      T* out = (T*)p.packed;
      for (int i = 0; i < e; ++i)
        out += PackedLayout<T>{p.hidden_size}.expert(p.expert_offsets[i + 1] - p.expert_offsets[i]);
      expert(int(e), out);
    }
  }
};

template <class T>
Status pack(const PackParams& p, const Team& team) {
  Pack<T> work{p};
  prefer_huge_pages(p.packed, size_t(packed_elements<T>(p)) * sizeof(T));
  run_team(team, team.max_size, [](void* arg, int, int) { ((Pack<T>*)arg)->run(); }, &work);
  return Status::kOk;
}

Status pack_weights(const PackParams& p, const Team& team) {
  switch (p.dtype) {
    case Dtype::kFloat64:
      return pack<double>(p, team);
    case Dtype::kFloat32:
      return pack<float>(p, team);
    case Dtype::kBFloat16:
      return pack<bf16>(p, team);
    case Dtype::kFloat16:
      return pack<fp16>(p, team);
  }
  return Status::kUnsupported;
}

int64_t packed_bytes(const PackParams& p) {
  switch (p.dtype) {
    case Dtype::kFloat64:
      return 8 * packed_elements<double>(p);
    case Dtype::kFloat32:
      return 4 * packed_elements<float>(p);
    case Dtype::kBFloat16:
      return 2 * packed_elements<bf16>(p);
    case Dtype::kFloat16:
      return 2 * packed_elements<fp16>(p);
  }
  return 0;
}

}  // namespace

const Kernels* kernels() {
  static constexpr Kernels table = {
      expert_mlp_forward, expert_mlp_backward, packed_bytes, pack_weights,
      quantized_bytes,    pack_quantized,      router,       sigmoids};
  return &table;
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

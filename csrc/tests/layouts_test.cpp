// expert_mlp on weights as models have them (WeightStrides), with every activation of the gate: forward, packed
// and backward, against the formula in double, for every ISA of this machine and every dtype.
#include "problem.h"

namespace {

// [neurons, H] as some tensor has it, which may hold other matrices beside it: `start` is its first element.
struct Place {
  WeightStrides strides;
  int64_t start, total;
};
int64_t element(const Problem& p, const Place& at, int e, int64_t n, int64_t h) {
  const WeightStrides& s = at.strides;
  return at.start + (s.expert ? e * s.expert : p.offsets[size_t(e)] * s.neuron) + n * s.neuron +
         h * s.hidden;
}
template <class F>
void for_each_weight(const Problem& p, F f) {
  for (int e = 0; e < p.E; ++e)
    for (int64_t n = 0; n < p.offsets[size_t(e) + 1] - p.offsets[size_t(e)]; ++n)
      for (int64_t h = 0; h < p.c.H; ++h) f(e, n, p.offsets[size_t(e)] + n, h);
}

struct Layout {
  std::string label;
  Place gate, up, down;  // gate and up in one tensor, down in another
};
std::vector<Layout> layouts(const Problem& p) {
  const int64_t I = p.I, H = p.c.H, S = p.c.sizes[0], fused = 2 * I * H;
  const Place transposed{{0, 1, I}, 0, I * H};
  std::vector<Layout> all = {
      {"[2I,H] and [H,I]", {{0, H, 1}, 0, fused}, {{0, H, 1}, I * H, fused}, transposed},
      {"rows of [I,2H+3]",
       {{0, 2 * H + 3, 1}, 0, I * (2 * H + 3)},
       {{0, 2 * H + 3, 1}, H + 3, I * (2 * H + 3)},
       {{0, H + 5, 1}, 2, I * (H + 5)}},
  };
  const bool is_equal =
      std::all_of(p.c.sizes.begin(), p.c.sizes.end(), [&](int s) { return s == S; });
  if (is_equal && S > 0)
    all.push_back({"[E,2S,H] and [E,H,S]",
                   {{2 * S * H, H, 1}, 0, fused},
                   {{2 * S * H, H, 1}, S * H, fused},
                   {{H * S, 1, S}, 0, I * H}});
  return all;
}

void run_case(const Case& c, Dtype dtype, Activation activation, const char* isa) {
  Problem p(c, dtype, 11);
  p.activation = activation;
  const Results want = reference(p);
  const double tol = tolerance(dtype, std::max({c.T, c.H, p.I, int64_t(16)}));
  const cpu::Team team = team_of(2);
  for (const Layout& layout : layouts(p)) {
    const std::string label = std::string(isa) + " " + name(dtype) + " " + c.label +
                              ", activation " + std::to_string(int(activation)) + ", " +
                              layout.label + ": ";
    Tensor gate_up(dtype, 1, layout.gate.total), down(dtype, 1, layout.down.total);
    for_each_weight(p, [&](int e, int64_t n, int64_t row, int64_t h) {
      gate_up.set(0, element(p, layout.gate, e, n, h), p.gate.at(row, h));
      gate_up.set(0, element(p, layout.up, e, n, h), p.up.at(row, h));
      down.set(0, element(p, layout.down, e, n, h), p.down.at(row, h));
    });
    const auto at = [&](Tensor& t, const Place& place) -> void* {
      return t.bytes.data() + place.start * dtype_size(dtype);
    };
    const auto describe = [&](auto& params) {
      params.gate_up = layout.gate.strides, params.down = layout.down.strides;
      params.gate_proj = at(gate_up, layout.gate), params.up_proj = at(gate_up, layout.up);
      params.down_proj_t = at(down, layout.down);
    };

    Tensor y(dtype, c.T, c.H), y_packed = y, kept(dtype, 1, 2 * c.T * p.I);
    ExpertMlpParams forward = p.params(y, nullptr, kept.data());
    describe(forward);
    check(label + "forward", cpu::expert_mlp(forward, team) == Status::kOk);
    compare(label + "y", y, want.y, tol);
    PackParams pack{};
    pack.dtype = dtype, pack.hidden_size = c.H, pack.intermediate_size = p.I;
    pack.num_experts = int32_t(p.E), pack.expert_offsets = p.offsets.data();
    describe(pack);
    std::vector<char> packed(size_t(cpu::packed_bytes(pack)) + 1);
    pack.packed = packed.data();
    check(label + "pack", cpu::pack_weights(pack, team) == Status::kOk);
    cpu::expert_mlp(p.params(y_packed, packed.data(), nullptr), team);
    compare(label + "y of packed weights", y_packed, want.y, tol);

    for (bool saved : {true, false}) {
      Tensor dx(dtype, c.T, c.H), dgates(p.gate_dtype, c.T, p.E),
          dgate_up(dtype, 1, layout.gate.total), ddown(dtype, 1, layout.down.total);
      ExpertMlpBackwardParams b{};
      b.forward = p.params(y, nullptr, saved ? kept.data() : nullptr);
      describe(b.forward);
      b.dy_stride = p.dy.stride, b.dy = p.dy.data(), b.grad_weight = p.grad_weight.data();
      b.dgate_up = layout.gate.strides, b.ddown = layout.down.strides;
      b.dx = dx.data(), b.dgates = dgates.data();
      b.dgate_proj = at(dgate_up, layout.gate), b.dup_proj = at(dgate_up, layout.up);
      b.ddown_proj_t = at(ddown, layout.down);
      check(label + "backward", cpu::expert_mlp_backward(b, team) == Status::kOk);
      Tensor dgate(dtype, p.I, c.H), dup = dgate, ddown_rows = dgate;
      for_each_weight(p, [&](int e, int64_t n, int64_t row, int64_t h) {
        dgate.set(row, h, dgate_up.at(0, element(p, layout.gate, e, n, h)));
        dup.set(row, h, dgate_up.at(0, element(p, layout.up, e, n, h)));
        ddown_rows.set(row, h, ddown.at(0, element(p, layout.down, e, n, h)));
      });
      const std::string mode = label + (saved ? "saved, " : "recomputed, ");
      compare(mode + "dx", dx, want.dx, tol);
      compare(mode + "dgates", dgates, want.dgates, tol);
      compare(mode + "dgate_proj", dgate, want.dgate, tol);
      compare(mode + "dup_proj", dup, want.dup, tol);
      compare(mode + "ddown_proj_t", ddown_rows, want.ddown, tol);
    }
  }
}

std::vector<Case> cases() {
  return {
      {"T=0", 0, 32, {16, 16}, 0.5},
      {"T=1", 1, 64, {32, 32, 32, 32}, 0.5},
      {"none active", 9, 40, {16, 16}, 0},
      {"off every tile", 37, 67, {19, 5, 33}, 0.6, 0.4, 3},
      {"odd", 13, 1, {1, 3}, 0.7, 0.5, 1},
      {"unequal and empty", 29, 130, {0, 70, 0, 0, 7, 1, 32, 0}, 0.5, 0.3, 6},
      {"equal, off every tile", 40, 50, {67, 67, 67}, 0.7, 0.3},
      {"few rows each", 4, 600, {40, 40, 40}, 0.6},
      {"wide H, gradients in two pieces", 20, 1100, {130, 130}, 0.6},
  };
}

}  // namespace

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";  // an ISA
  for (const char* const* isa = cpu::isas(); *isa; ++isa) {
    if (!only.empty() && only != *isa) continue;
    check("force_isa", cpu::force_isa(*isa));
    for (Dtype d : {Dtype::kFloat64, Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16})
      for (Activation a : {Activation::kSilu, Activation::kGeluTanh, Activation::kGelu})
        for (const Case& c : cases()) run_case(c, d, a, *isa);
    std::printf("%s done, %d failures so far\n", *isa, failures);
  }
  std::printf(failures ? "%d FAILED\n" : "all passed\n", failures);
  return failures != 0;
}

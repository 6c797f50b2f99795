// expert_mlp, forward and backward, against the formula in double, for every ISA of this machine
// and every dtype, over the edge table; and the same bits for any number of threads. Runs under
// ASan, UBSan and TSan.
#include "problem.h"

namespace {

void run_case(const Case& c, Dtype dtype, const char* isa) {
  Problem p(c, dtype, 7);
  const Results want = reference(p);
  const std::string label = std::string(isa) + " " + name(dtype) + " " + c.label + ": ";
  const double tol = tolerance(dtype, std::max({c.T, c.H, p.I, int64_t(16)}));
  std::vector<std::vector<char>> first;  // results with one thread
  for (int threads : {1, 2, 3}) {
    const cpu::Team team = team_of(threads);
    const WeightStrides strides{0, c.H, 1};
    PackParams pack{dtype,         c.H,         p.I,           int32_t(p.E),     strides, strides,
                    p.gate.data(), p.up.data(), p.down.data(), p.offsets.data(), nullptr};
    std::vector<char> packed(size_t(cpu::packed_bytes(pack)));
    pack.packed = packed.data();
    check(label + "pack", cpu::pack_weights(pack, team) == Status::kOk);
    Tensor y(dtype, c.T, c.H), y_packed(dtype, c.T, c.H), kept(dtype, 1, 2 * c.T * p.I);
    check(label + "forward",
          cpu::expert_mlp(p.params(y, nullptr, kept.data()), team) == Status::kOk);
    const bool has_packed = !packed.empty();
    check(label + "packed",
          cpu::expert_mlp(p.params(y_packed, has_packed ? packed.data() : nullptr, nullptr),
                          team) == Status::kOk);
    compare(label + "y", y, want.y, tol);
    check(label + "packed weights give other bits", y.bytes == y_packed.bytes);
    std::vector<std::vector<char>> results = {y.bytes};
    for (bool saved : {true, false}) {
      Tensor dx(dtype, c.T, c.H), dgates(p.gate_dtype, c.T, p.E), dgate(dtype, p.I, c.H),
          dup = dgate, ddown = dgate;
      ExpertMlpBackwardParams b{};
      b.forward = p.params(y, nullptr, saved ? kept.data() : nullptr);
      b.dy_stride = p.dy.stride, b.dy = p.dy.data(), b.grad_weight = p.grad_weight.data();
      b.dgate_up = b.ddown = {0, c.H, 1};
      b.dx = dx.data(), b.dgates = dgates.data(), b.dgate_proj = dgate.data(),
      b.dup_proj = dup.data();
      b.ddown_proj_t = ddown.data();
      check(label + "backward", cpu::expert_mlp_backward(b, team) == Status::kOk);
      const std::string mode = label + (saved ? "saved, " : "recomputed, ");
      compare(mode + "dx", dx, want.dx, tol);
      compare(mode + "dgates", dgates, want.dgates, tol);
      compare(mode + "dgate_proj", dgate, want.dgate, tol);
      compare(mode + "dup_proj", dup, want.dup, tol);
      compare(mode + "ddown_proj_t", ddown, want.ddown, tol);
      for (Tensor* t : {&dx, &dgates, &dgate, &dup, &ddown}) results.push_back(t->bytes);

      // Each output alone has the same bits as all of them together.
      if (threads != 2) continue;
      for (int wanted = 0; wanted < 5; ++wanted) {
        Tensor* outputs[5] = {&dx, &dgates, &dgate, &dup, &ddown};
        Tensor alone = *outputs[wanted];
        std::fill(alone.bytes.begin(), alone.bytes.end(), char(0xff));
        ExpertMlpBackwardParams one = b;
        void** slots[5] = {&one.dx, &one.dgates, &one.dgate_proj, &one.dup_proj, &one.ddown_proj_t};
        for (int i = 0; i < 5; ++i) *slots[i] = i == wanted ? alone.data() : nullptr;
        cpu::expert_mlp_backward(one, team);
        check(mode + "output " + std::to_string(wanted) + " alone differs",
              alone.bytes == outputs[wanted]->bytes);
      }
    }
    if (threads == 1) first = results;
    check(label + "other bits with " + std::to_string(threads) + " threads", results == first);
  }
}

// What is infinite or no number in one expert's weights, or in one token, reaches no other: neither through the
// last tile of a matrix, whose end lies in the next one, nor through rows and columns that pad a tile.
void run_poisoned(Dtype dtype, const char* isa) {
  const Case c{"poisoned", 37, 35, {19, 5, 33}, 0.6, 0.5};
  const std::string label = std::string(isa) + " " + name(dtype) + " poisoned: ";
  const int kExpert = 1, kToken = 4;
  std::vector<std::vector<double>> clean;
  for (bool is_poisoned : {false, true}) {
    Problem p(c, dtype, 11);
    for (int e = 0; e < p.E; ++e) p.gates.set(kToken, e, e == kExpert ? 1 : 0);
    for (int64_t h = 0; is_poisoned && h < c.H; ++h) {
      const double bad[] = {NAN, INFINITY, -INFINITY};
      for (int64_t i = p.offsets[kExpert]; i < p.offsets[kExpert + 1]; ++i)
        for (Tensor* w : {&p.gate, &p.up, &p.down}) w->set(i, h, bad[(i + h) % 3]);
      p.x.set(kToken, h, bad[h % 3]);
      p.dy.set(kToken, h, bad[(h + 1) % 3]);
    }
    const cpu::Team team = team_of(2);
    const WeightStrides strides{0, c.H, 1};
    PackParams pack{dtype,         c.H,         p.I,           int32_t(p.E),     strides, strides,
                    p.gate.data(), p.up.data(), p.down.data(), p.offsets.data(), nullptr};
    std::vector<char> packed(size_t(cpu::packed_bytes(pack)));
    pack.packed = packed.data();
    cpu::pack_weights(pack, team);
    Tensor y(dtype, c.T, c.H), y_packed = y, dx = y, dgate(dtype, p.I, c.H), dup = dgate,
                               ddown = dgate;
    cpu::expert_mlp(p.params(y, nullptr, nullptr), team);
    cpu::expert_mlp(p.params(y_packed, packed.data(), nullptr), team);
    ExpertMlpBackwardParams b{};
    b.forward = p.params(y, nullptr, nullptr);
    b.dgate_up = b.ddown = strides;
    b.dy_stride = p.dy.stride, b.dy = p.dy.data();
    b.dx = dx.data(), b.dgate_proj = dgate.data(), b.dup_proj = dup.data();
    b.ddown_proj_t = ddown.data();
    cpu::expert_mlp_backward(b, team);
    std::vector<std::vector<double>> others;  // all that neither the expert nor the token enters
    for (const Tensor* t : {&y, &y_packed, &dx}) {
      others.emplace_back();
      for (int64_t i = 0; i < c.T; ++i)
        for (int64_t h = 0; h < c.H && p.gates.at(i, kExpert) == 0; ++h)
          others.back().push_back(t->at(i, h));
    }
    for (const Tensor* t : {&dgate, &dup, &ddown}) {
      others.emplace_back();
      for (int64_t i = 0; i < p.I; ++i)
        for (int64_t h = 0; h < c.H; ++h)
          if (i < p.offsets[kExpert] || i >= p.offsets[kExpert + 1])
            others.back().push_back(t->at(i, h));
    }
    if (!is_poisoned) clean = others;
    const char* const outputs[] = {"y",          "y of packed", "dx",
                                   "dgate_proj", "dup_proj",    "ddown_proj_t"};
    for (size_t i = 0; i < others.size(); ++i) check(label + outputs[i], others[i] == clean[i]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";  // an ISA
  for (const char* const* isa = cpu::isas(); *isa; ++isa) {
    if (!only.empty() && only != *isa) continue;
    check("force_isa", cpu::force_isa(*isa) && std::strcmp(cpu::isa(), *isa) == 0);
    for (Dtype d : {Dtype::kFloat64, Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
      for (const Case& c : edge_table()) run_case(c, d, *isa);
      run_poisoned(d, *isa);
    }
    std::printf("%s done, %d failures so far\n", *isa, failures);
  }
  check("unknown ISA", !cpu::force_isa("z80"));
  std::printf(failures ? "%d FAILED\n" : "all passed\n", failures);
  return failures != 0;
}

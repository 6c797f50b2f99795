// expert_mlp on quantized weights: against the formula in double of the dequantized ones, for every ISA of this
// machine, every format and every dtype that has them, over the edge table; and the same bits for any number
// of threads. Runs under ASan, UBSan and TSan.
#include "problem.h"

namespace {

// Random codes and numbers of one matrix; of groups along its rows (hidden) or along an expert's neurons.
// Groups' numbers are such that weights are exact in bf16, to which many rows' are rounded.
struct Quantized {
  std::vector<int8_t> codes;
  std::vector<float> of_channels;
  std::vector<uint16_t> scales, mins;

  Quantized(const QuantFormat& f, const std::vector<int32_t>& offsets, int64_t H,
            bool along_neurons, unsigned seed, Tensor& weight) {
    std::mt19937 random(seed);
    std::uniform_int_distribution<int> code(-(1 << (f.bits - 1)), (1 << (f.bits - 1)) - 1);
    std::uniform_real_distribution<double> uniform(0.5, 1.5);
    std::uniform_int_distribution<int> power(-1, 1), least(-8, 8);
    const int64_t I = offsets.back(), g = f.group_size;
    const double size = 2 / std::sqrt(double(H)) / (1 << (f.bits - 1));
    codes.resize(size_t(I * H));
    for (auto& c : codes) c = int8_t(code(random));
    int64_t group = 0;  // of numbers: before this expert's, or this row's
    for (size_t e = 0; e + 1 < offsets.size(); ++e) {
      const int64_t S = offsets[e + 1] - offsets[e];
      const int64_t rows = along_neurons && g ? (S + g - 1) / g : S;
      const int64_t columns = !g || along_neurons ? H : (H + g - 1) / g;
      const int64_t channels = along_neurons ? (e ? 0 : H) : S;  // down's are those of all experts
      for (int64_t i = 0; i < (g ? rows * columns : channels); ++i) {
        const double scale = std::exp2(std::floor(std::log2(size)) + power(random));
        if (!g) of_channels.push_back(float(uniform(random) * size));
        if (g) scales.push_back(to_half(float(scale)));
        if (f.has_min) mins.push_back(to_half(float(scale * least(random))));
      }
      for (int64_t s = 0; s < S; ++s)
        for (int64_t h = 0; h < H; ++h) {
          const int64_t row = offsets[e] + s;
          const int64_t at = !g              ? (along_neurons ? h : row)
                             : along_neurons ? group + s / g * H + h
                                             : group + s * columns + h / g;
          const double scale = g ? from_half(scales[at]) : of_channels[at];
          weight.set(row, h, scale * codes[row * H + h] + (f.has_min ? from_half(mins[at]) : 0.f));
        }
      group += rows * columns;
    }
  }
  QuantizedMatrix matrix(const QuantFormat& f) const {
    return {codes.data(), f.group_size ? (const void*)scales.data() : of_channels.data(),
            f.has_min ? mins.data() : nullptr};
  }
};

// What the plain kernel loses on the same weights in the same dtype: with mins, sums cancel.
double plain_error(const Case& c, const Problem& quantized, const Results& want) {
  Problem p(c, quantized.dtype, 7);
  for (auto [to, from] : {std::pair{&p.gate, &quantized.gate}, std::pair{&p.up, &quantized.up},
                          std::pair{&p.down, &quantized.down}})
    for (int64_t i = 0; i < p.I; ++i)
      for (int64_t h = 0; h < c.H; ++h) to->set(i, h, from->at(i, h));
  Tensor y(p.dtype, c.T, c.H);
  const ExpertMlpParams params = p.params(y, nullptr, nullptr);
  check("plain forward", cpu::expert_mlp(params, team_of(1)) == Status::kOk);
  return worst_error(y, want.y);
}

void run_case(const Case& c, Dtype dtype, const QuantFormat& format, const char* isa) {
  Problem p(c, dtype, 7);
  p.gate = p.up = p.down = Tensor(Dtype::kFloat64, p.I, c.H);
  const Quantized gate(format, p.offsets, c.H, false, 1, p.gate),
      up(format, p.offsets, c.H, false, 2, p.up), down(format, p.offsets, c.H, true, 3, p.down);
  const Results want = reference(p);
  const std::string label = std::string(isa) + " " + name(dtype) + " " +
                            std::to_string(format.bits) + " bits, groups of " +
                            std::to_string(format.group_size) + (format.has_min ? ", mins " : " ") +
                            c.label + ": ";
  const double tol = std::max(tolerance(dtype, std::max({c.T, c.H, p.I, int64_t(16)})),
                              2 * plain_error(c, p, want));
  std::vector<char> first;
  for (int threads : {1, 2, 3}) {
    const cpu::Team team = team_of(threads);
    PackQuantizedParams pack{format,
                             c.H,
                             p.I,
                             int32_t(p.E),
                             gate.matrix(format),
                             up.matrix(format),
                             down.matrix(format),
                             p.offsets.data(),
                             nullptr};
    std::vector<char> packed(size_t(cpu::quantized_bytes(pack)));
    pack.packed = packed.data();
    check(label + "pack", cpu::pack_quantized(pack, team) == Status::kOk);
    Tensor y(dtype, c.T, c.H);
    const char none = 0;
    ExpertMlpParams params = p.params(y, packed.empty() ? &none : packed.data(), nullptr);
    params.packed_format = format;
    check(label + "forward", cpu::expert_mlp(params, team) == Status::kOk);
    compare(label + "y", y, want.y, tol);
    if (threads == 1) first = y.bytes;
    check(label + "other bits with " + std::to_string(threads) + " threads", y.bytes == first);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string only = argc > 1 ? argv[1] : "";  // an ISA
  for (const char* const* isa = cpu::isas(); *isa; ++isa) {
    if (!only.empty() && only != *isa) continue;
    check("force_isa", cpu::force_isa(*isa));
    for (const QuantFormat& format :
         {QuantFormat{8, 0, false}, QuantFormat{8, 32, false}, QuantFormat{4, 32, false},
          QuantFormat{4, 32, true}, QuantFormat{4, 64, true}})
      for (Dtype d : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16})
        for (const Case& c : edge_table()) run_case(c, d, format, *isa);
    std::printf("%s done, %d failures so far\n", *isa, failures);
  }
  std::printf(failures ? "%d FAILED\n" : "all passed\n", failures);
  return failures != 0;
}

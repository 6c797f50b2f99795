// What the C++ tests share: tensors of every dtype, the edge table, random problems over it, and the
// formula in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"

using namespace dsmoe;

namespace {

int failures = 0;

void std_thread_parallel(void*, int size, void (*body)(void*, int, int), void* arg) {
  std::vector<std::thread> threads;
  for (int i = 1; i < size; ++i) threads.emplace_back(body, arg, i, size);
  body(arg, 0, size);
  for (auto& t : threads) t.join();
}
cpu::Team team_of(int size) {
  return {size, nullptr, std_thread_parallel};
}

// ------------------------------------------------------------------------------------------------------------
// dtypes

const char* name(Dtype d) {
  const char* names[] = {"fp64", "fp32", "bf16", "fp16"};
  return names[int(d)];
}
// Allowed error against |want| + rms(want). Sums of K terms lose about sqrt(K) roundings of C; half
// types lose one rounding of each operand and of the output besides.
double tolerance(Dtype d, int64_t k) {
  const double rounding[] = {1.1e-16, 6e-8, 6e-8, 6e-8}, halves[] = {0, 0, 3e-2, 4e-3};
  return halves[int(d)] + 5 * rounding[int(d)] * std::sqrt(double(k));
}

uint16_t to_half(float f) {
  if (f == 0) return 0;
  if (!std::isfinite(f)) return uint16_t((std::isnan(f) ? 0x7e00 : 0x7c00) | (f < 0 ? 0x8000 : 0));
  int exponent;
  const float m = std::frexp(std::fabs(f), &exponent);  // m in [0.5, 1)
  const int shift = exponent < -13 ? -24 : exponent - 11;
  const long mantissa = std::lrint(std::ldexp(double(m), exponent - shift));
  long bits = shift == -24 ? mantissa : ((shift + 25) << 10) + (mantissa - 1024);
  return uint16_t(bits | (f < 0 ? 0x8000 : 0));
}
float from_half(uint16_t h) {
  const int exponent = (h >> 10) & 31, mantissa = h & 1023;
  float v = exponent == 31  ? (mantissa ? NAN : INFINITY)
            : exponent == 0 ? std::ldexp(float(mantissa), -24)
                            : std::ldexp(float(mantissa + 1024), exponent - 25);
  return h & 0x8000 ? -v : v;
}
void put(void* at, Dtype d, int64_t i, double v) {
  if (d == Dtype::kFloat64) static_cast<double*>(at)[i] = v;
  if (d == Dtype::kFloat32) static_cast<float*>(at)[i] = float(v);
  if (d == Dtype::kFloat16) static_cast<uint16_t*>(at)[i] = to_half(float(v));
  if (d == Dtype::kBFloat16) {
    float f = float(v);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    static_cast<uint16_t*>(at)[i] = uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
}
double get(const void* at, Dtype d, int64_t i) {
  if (d == Dtype::kFloat64) return static_cast<const double*>(at)[i];
  if (d == Dtype::kFloat32) return static_cast<const float*>(at)[i];
  if (d == Dtype::kFloat16) return from_half(static_cast<const uint16_t*>(at)[i]);
  const uint32_t u = uint32_t(static_cast<const uint16_t*>(at)[i]) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

struct Tensor {  // exactly as many bytes as it needs, so that ASan sees every overrun
  Dtype dtype;
  int64_t rows, columns, stride;
  std::vector<char> bytes;
  Tensor(Dtype d, int64_t r, int64_t c, int64_t s = 0)
      : dtype(d), rows(r), columns(c), stride(s ? s : c) {
    bytes.assign(size_t(r ? (r - 1) * stride + c : 0) * dtype_size(d),
                 char(0xff));  // NaN where nothing is written
  }
  void* data() { return bytes.data(); }
  double at(int64_t r, int64_t c) const { return get(bytes.data(), dtype, r * stride + c); }
  void set(int64_t r, int64_t c, double v) { put(bytes.data(), dtype, r * stride + c, v); }
};

// -------------------------------------------------------------------------------------------------------------
// cases

struct Case {
  std::string label;
  int64_t T, H;
  std::vector<int> sizes;
  double density;  // of active pairs; -1: every token only expert 0; -2: expert e only token e
  double extra_density = 0.5;    // of grad_weight among the inactive pairs
  int64_t padding = 0;           // of rows of x and dy
  std::vector<int> counts = {};  // if given: expert e takes the first counts[e] tokens
};

// Every side of a tile of 16 rows, of a block of two and of the 32 that a tile takes of K: experts of each
// size in turn, for each number of tokens.
Case tile_borders(int64_t H) {
  Case c{"tile borders, H=" + std::to_string(H), 33, H, {}, 0};
  for (int count : {2, 3, 16, 17, 32, 33})
    for (int size : {1, 15, 17, 33}) {
      c.counts.push_back(count);
      c.sizes.push_back(size);
    }
  return c;
}

[[maybe_unused]] std::vector<Case> edge_table() {
  std::vector<Case> cases = {
      {"T=0", 0, 32, {16, 16}, 0.5},
      {"T=1", 1, 64, {32, 32, 32, 32}, 0.5},
      {"T=1 dense", 1, 96, {48, 16}, 1},
      {"none active", 9, 40, {16, 8}, 0},
      {"none active, nothing extra", 9, 40, {16, 8}, 0, 0},
      {"all active", 33, 64, {32, 48, 16}, 1},
      {"one expert takes all", 50, 64, {24, 24, 24}, -1},
      {"one token each", 6, 32, {16, 16, 16, 16, 16, 16}, -2},
      {"off every tile", 37, 67, {19, 5, 33}, 0.6, 0.4, 3},
      {"odd", 13, 1, {1, 3}, 0.7, 0.5, 1},
      {"E=1", 21, 80, {100}, 0.8},
      {"unequal and empty", 29, 130, {0, 70, 0, 0, 7, 1, 32, 0}, 0.5, 0.3, 6},
      {"no expert has a neuron", 5, 32, {0, 0}, 0.5},
      {"shared beside fine", 65, 96, {64, 16, 16, 16, 16, 16, 16, 16, 16}, 0.5},
      {"groups in token order, and others", 70, 70, {400, 16, 380, 7, 3, 300, 16}, 0.8},
      {"fine", 65, 70, {16, 32, 16, 7, 16, 16, 32, 48}, 0.5},
      {"several token blocks", 1601, 48, {40, 24}, 0.4, 0.1},
      {"wide H, token blocks", 300, 1030, {17, 40}, 0.5, 0.2},
      {"rows of x a page apart", 13, 2048, {31}, 0.9},
      {"rows of x a page apart, padded", 11, 2000, {20}, 1, 0.5, 48},
      {"rows of the activations a page apart", 11, 32, {1024, 2048}, 0.9},
  };
  for (int64_t H : {1, 31, 33}) cases.push_back(tile_borders(H));
  cases.push_back({"E=512", 7, 24, std::vector<int>(512, 3), 0.2, 0.1});
  return cases;
}

struct Problem {
  const Case& c;
  Dtype dtype, gate_dtype;
  int64_t E, I = 0;
  std::vector<int32_t> offsets;
  Activation activation = Activation::kSilu;
  Tensor x, dy, gates, grad_weight, gate, up, down;

  Problem(const Case& test, Dtype d, unsigned seed)
      : c(test),
        dtype(d),
        gate_dtype(d == Dtype::kFloat64 ? d : Dtype::kFloat32),
        E(int64_t(test.sizes.size())),
        x(d, c.T, c.H, c.H + c.padding),
        dy(d, c.T, c.H, c.H + c.padding),
        gates(gate_dtype, c.T, E),
        grad_weight(gate_dtype, c.T, E),
        gate(d, total(), c.H),
        up(d, total(), c.H),
        down(d, total(), c.H) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::uniform_real_distribution<double> uniform;
    const auto fill = [&](Tensor& t, double scale) {
      for (int64_t r = 0; r < t.rows; ++r)
        for (int64_t k = 0; k < t.columns; ++k) t.set(r, k, normal(random) * scale);
    };
    fill(x, 1);
    fill(dy, 1);
    for (Tensor* w : {&gate, &up, &down}) fill(*w, 1 / std::sqrt(double(c.H)));
    for (int64_t t = 0; t < c.T; ++t)
      for (int64_t e = 0; e < E; ++e) {
        const bool is_active = !c.counts.empty() ? t < c.counts[size_t(e)]
                               : c.density >= 0  ? uniform(random) < c.density
                               : c.density == -1 ? e == 0
                                                 : e == t;
        gates.set(t, e, is_active ? 0.5 + uniform(random) : 0);
        grad_weight.set(t, e, uniform(random) < c.extra_density ? 1 / c.extra_density : 0);
      }
  }
  int64_t total() {
    offsets = {0};
    for (int s : c.sizes) offsets.push_back(offsets.back() + s);
    return I = offsets.back();
  }
  ExpertMlpParams params(Tensor& y, const void* packed, void* activations) {
    ExpertMlpParams p{};
    p.dtype = dtype;
    p.num_tokens = c.T, p.hidden_size = c.H, p.intermediate_size = I, p.num_experts = int32_t(E);
    p.x_stride = x.stride, p.x = x.data(), p.gates = gates.data();
    p.activation = activation;
    p.gate_up = p.down = {0, c.H, 1};
    if (packed) p.packed = packed;
    if (!packed) p.gate_proj = gate.data(), p.up_proj = up.data(), p.down_proj_t = down.data();
    p.expert_offsets = offsets.data();
    p.y = y.data();
    p.activations = activations;
    return p;
  }
};

struct Gate {
  double value, slope;
};
Gate gate_of(Activation activation, double g) {
  if (activation == Activation::kSilu) {
    const double s = 1 / (1 + std::exp(-g));
    return {g * s, s * (1 + g * (1 - s))};
  }
  if (activation == Activation::kGeluTanh) {
    const double scale = std::sqrt(2 / std::acos(-1.0)),
                 t = std::tanh(scale * (g + 0.044715 * g * g * g));
    return {g / 2 * (1 + t),
            (1 + t) / 2 + g / 2 * (1 - t * t) * scale * (1 + 3 * 0.044715 * g * g)};
  }
  const double mass = std::erfc(-g / std::sqrt(2.0)) / 2;
  return {g * mass, mass + g * std::exp(-g * g / 2) / std::sqrt(2 * std::acos(-1.0))};
}

struct Results {
  std::vector<double> y, dx, dgates, dgate, dup, ddown;
};

Results reference(Problem& p) {
  const int64_t T = p.c.T, H = p.c.H, E = p.E;
  Results o;
  o.y.assign(T * H, 0), o.dx = o.y, o.dgates.assign(T * E, 0), o.dgate.assign(p.I * H, 0),
                        o.dup = o.ddown = o.dgate;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t e = 0; e < E; ++e) {
      const double gate = p.gates.at(t, e), weight = p.grad_weight.at(t, e);
      for (int64_t i = p.offsets[e]; i < p.offsets[e + 1]; ++i) {
        double g = 0, u = 0, da = 0;
        for (int64_t h = 0; h < H; ++h) {
          g += p.x.at(t, h) * p.gate.at(i, h);
          u += p.x.at(t, h) * p.up.at(i, h);
          da += p.dy.at(t, h) * p.down.at(i, h);
        }
        const Gate act = gate_of(p.activation, g);
        const double a = act.value * u;
        o.dgates[t * E + e] += a * da * (gate != 0 ? 1 : weight);
        if (gate == 0) continue;
        const double du = gate * da * act.value, dg = gate * da * u * act.slope;
        for (int64_t h = 0; h < H; ++h) {
          o.y[t * H + h] += gate * a * p.down.at(i, h);
          o.dx[t * H + h] += dg * p.gate.at(i, h) + du * p.up.at(i, h);
          o.dgate[i * H + h] += dg * p.x.at(t, h);
          o.dup[i * H + h] += du * p.x.at(t, h);
          o.ddown[i * H + h] += gate * a * p.dy.at(t, h);
        }
      }
    }
  return o;
}

// The largest error of any element, over its own size and that of the mean one; NaN if there is one.
double worst_error(const Tensor& got, const std::vector<double>& want) {
  double rms = 0, worst = 0;
  for (double v : want) rms += v * v;
  rms = std::sqrt(rms / std::max<size_t>(want.size(), 1));
  for (int64_t r = 0; r < got.rows; ++r)
    for (int64_t k = 0; k < got.columns; ++k) {
      const double w = want[r * got.columns + k],
                   error = std::fabs(got.at(r, k) - w) / (std::fabs(w) + rms + 1e-30);
      worst = error <= worst ? worst : error;  // NaN counts
    }
  return worst;
}

void compare(const std::string& what, const Tensor& got, const std::vector<double>& want,
             double tolerance) {
  const double worst = worst_error(got, want);
  if (!(worst <= tolerance)) {
    std::printf("FAILED %s: error %.2e, allowed %.2e\n", what.c_str(), worst, tolerance);
    ++failures;
  }
}

void check(const std::string& what, bool ok) {
  if (ok) return;
  std::printf("FAILED %s\n", what.c_str());
  ++failures;
}

}  // namespace

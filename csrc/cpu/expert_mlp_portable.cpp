// expert_mlp and its backward by the formula, one dot product after the other (see kernels.h).
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/parallel.h"
#include "kernels.h"

namespace dsmoe::cpu {
namespace {

float load16(uint16_t v, bool half) {
  if (half) {
    _Float16 h;
    std::memcpy(&h, &v, 2);
    return static_cast<float>(h);
  }
  uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
uint16_t store16(float f, bool half) {
  uint16_t out;
  if (half) {
    _Float16 h = static_cast<_Float16>(f);
    std::memcpy(&out, &h, 2);
    return out;
  }
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <class C>
struct Matrix {
  std::vector<C> data;
  Matrix(const void* src, Dtype d, int64_t rows, int64_t cols, int64_t stride) : data(rows * cols) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        const int64_t i = r * stride + c;
        C& o = data[r * cols + c];
        if (d == Dtype::kFloat64)
          o = static_cast<C>(static_cast<const double*>(src)[i]);
        else if (d == Dtype::kFloat32)
          o = static_cast<C>(static_cast<const float*>(src)[i]);
        else
          o = static_cast<C>(load16(static_cast<const uint16_t*>(src)[i], d == Dtype::kFloat16));
      }
  }
};
template <class C>
void store(void* dst, Dtype d, const std::vector<C>& v) {
  for (size_t i = 0; i < v.size(); ++i) {
    if (d == Dtype::kFloat64)
      static_cast<double*>(dst)[i] = v[i];
    else if (d == Dtype::kFloat32)
      static_cast<float*>(dst)[i] = static_cast<float>(v[i]);
    else
      static_cast<uint16_t*>(dst)[i] = store16(static_cast<float>(v[i]), d == Dtype::kFloat16);
  }
}

template <class C>
struct Weights {
  Matrix<C> g, u, d;
  explicit Weights(const ExpertMlpParams& p)
      : g(p.packed ? p.packed : p.gate_proj, p.dtype, p.intermediate_size, p.hidden_size,
          p.hidden_size),
        u(p.packed ? static_cast<const char*>(p.packed) +
                         p.intermediate_size * p.hidden_size * dtype_size(p.dtype)
                   : p.up_proj,
          p.dtype, p.intermediate_size, p.hidden_size, p.hidden_size),
        d(p.packed ? static_cast<const char*>(p.packed) +
                         2 * p.intermediate_size * p.hidden_size * dtype_size(p.dtype)
                   : p.down_proj_t,
          p.dtype, p.intermediate_size, p.hidden_size, p.hidden_size) {}
};

template <class C>
C dot(const C* a, const C* b, int64_t n) {
  C s = 0;
  for (int64_t i = 0; i < n; ++i) s += a[i] * b[i];
  return s;
}
template <class C>
void axpy(C s, const C* a, C* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += s * a[i];
}

template <class C>
Status fwd(const ExpertMlpParams& p, const Team& team) {
  const int64_t H = p.hidden_size, T = p.num_tokens;
  Weights<C> w(p);
  Matrix<C> x(p.x, p.dtype, T, H, p.x_stride);
  std::vector<C> y(T * H);
  for_each_chunk(team, chunk_count(team, T * H), T, [&](int, int64_t b, int64_t e_) {
    for (int64_t t = b; t < e_; ++t)
      for (int e = 0; e < p.num_experts; ++e) {
        const C gate = static_cast<const C*>(p.gates)[t * p.num_experts + e];
        if (gate == C(0)) continue;
        for (int64_t i = p.expert_offsets[e]; i < p.expert_offsets[e + 1]; ++i) {
          const C g = dot(&x.data[t * H], &w.g.data[i * H], H),
                  u = dot(&x.data[t * H], &w.u.data[i * H], H);
          axpy(gate * u * g / (C(1) + std::exp(-g)), &w.d.data[i * H], &y[t * H], H);
        }
      }
  });
  store(p.y, p.dtype, y);
  return Status::kOk;
}

template <class C>
Status bwd(const ExpertMlpBackwardParams& b, const Team&) {
  const ExpertMlpParams& p = b.forward;
  const int64_t H = p.hidden_size, T = p.num_tokens, I = p.intermediate_size;
  Weights<C> w(p);
  Matrix<C> x(p.x, p.dtype, T, H, p.x_stride), dy(b.dy, p.dtype, T, H, b.dy_stride);
  std::vector<C> dx(T * H), dg(I * H), du(I * H), dd(I * H);
  for (int64_t t = 0; t < T; ++t)
    for (int e = 0; e < p.num_experts; ++e) {
      const C gate = static_cast<const C*>(p.gates)[t * p.num_experts + e];
      const C gw =
          b.grad_weight ? static_cast<const C*>(b.grad_weight)[t * p.num_experts + e] : C(0);
      C dgate = 0;
      const bool active = gate != C(0);
      if (active || gw != C(0))
        for (int64_t i = p.expert_offsets[e]; i < p.expert_offsets[e + 1]; ++i) {
          const C g = dot(&x.data[t * H], &w.g.data[i * H], H),
                  u = dot(&x.data[t * H], &w.u.data[i * H], H);
          const C s = C(1) / (C(1) + std::exp(-g)), a = g * s * u,
                  da = dot(&dy.data[t * H], &w.d.data[i * H], H);
          dgate += a * da;
          if (!active) continue;
          axpy(gate * a, &dy.data[t * H], &dd[i * H], H);
          const C d_u = gate * da * g * s, d_g = gate * da * u * s * (C(1) + g * (C(1) - s));
          axpy(d_u, &x.data[t * H], &du[i * H], H);
          axpy(d_g, &x.data[t * H], &dg[i * H], H);
          axpy(d_u, &w.u.data[i * H], &dx[t * H], H);
          axpy(d_g, &w.g.data[i * H], &dx[t * H], H);
        }
      if (b.dgates) static_cast<C*>(b.dgates)[t * p.num_experts + e] = active ? dgate : gw * dgate;
    }
  if (b.dx) store(b.dx, p.dtype, dx);
  if (b.dgate_proj) store(b.dgate_proj, p.dtype, dg);
  if (b.dup_proj) store(b.dup_proj, p.dtype, du);
  if (b.ddown_proj_t) store(b.ddown_proj_t, p.dtype, dd);
  return Status::kOk;
}

const char* const kIsas[] = {"portable", nullptr};

}  // namespace

Status expert_mlp(const ExpertMlpParams& p, const Team& team) {
  return p.dtype == Dtype::kFloat64 ? fwd<double>(p, team) : fwd<float>(p, team);
}
Status expert_mlp_backward(const ExpertMlpBackwardParams& p, const Team& team) {
  return p.forward.dtype == Dtype::kFloat64 ? bwd<double>(p, team) : bwd<float>(p, team);
}
int64_t packed_bytes(const PackParams& p) {
  return 3 * p.intermediate_size * p.hidden_size * dtype_size(p.dtype);
}
Status pack_weights(const PackParams& p, const Team&) {
  const int64_t n = p.intermediate_size * p.hidden_size * dtype_size(p.dtype);
  std::memcpy(p.packed, p.gate_proj, n);
  std::memcpy(static_cast<char*>(p.packed) + n, p.up_proj, n);
  std::memcpy(static_cast<char*>(p.packed) + 2 * n, p.down_proj_t, n);
  return Status::kOk;
}
const char* isa() {
  return "portable";
}
const char* const* isas() {
  return kIsas;
}
bool force_isa(const char* name) {
  return std::strcmp(name, "portable") == 0;
}

}  // namespace dsmoe::cpu

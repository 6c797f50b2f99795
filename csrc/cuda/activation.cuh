// act(g) and act'(g) for every activation of kernels.h, by one formula: act(g) = g s, where s = 1 / (1 + exp(-w)) and
//
//   silu        w = g
//   gelu_tanh   w = 2 sqrt(2/pi) (g + 0.044715 g^3), since 1 + tanh(w/2) = 2 s
//   gelu        w = g (a + b g^2 + c g^4), fitted to Phi(g): act is off by 3.1e-5 at most, act' by 9.4e-5: near
//               0 less than half types and tf32 can tell, far below it not
//
// so that kernels, whose ends are long and unrolled, have no branch and no copy for each; what differs are numbers
// among their arguments.
#pragma once

#include "kernels.h"

namespace dsmoe::cuda {

struct Activated {
  float value, slope;
};

struct Logistic {
  float exponent[3];    // of -w / g as a polynomial in g^2, to the base of 2
  float derivative[3];  // dw/dg, the same

  static Logistic of(Activation activation) {
    const float fit[3][3] = {{1.f, 0.f, 0.f},
                             {1.5957691216f, 0.0713548163f, 0.f},
                             {1.594948984f, 0.0739700293f, -0.00069163527f}};
    Logistic made{};
    for (int i = 0; i < 3; ++i) {
      const float term = fit[static_cast<int>(activation)][i];
      made.exponent[i] = term * -1.44269504f;
      made.derivative[i] = term * static_cast<float>(2 * i + 1);
    }
    return made;
  }

  // Beyond |g| = 6 a gelu's s is 0 or 1 whatever w grows to.
  static __device__ __forceinline__ float square(float g) { return fminf(g * g, 36.f); }
  // One number of three comes from the constant bank at a time, with no fused multiply-add that would want two: the
  // ends of tiles have no registers to hold them in.
  static __device__ __forceinline__ float polynomial(const float (&terms)[3], float z) {
    const float higher = __fmul_rn(__fmul_rn(z, terms[2]), z);
    return __fadd_rn(fmaf(z, terms[1], higher), terms[0]);
  }
  // exp(-w). Added to 1, what ex2 flushes to zero makes no difference: __expf would guard it with three
  // instructions more.
  __device__ __forceinline__ float power(float g) const {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(g * polynomial(exponent, square(g))));
    return power;
  }
  __device__ __forceinline__ float value(float g) const { return __fdividef(g, 1.f + power(g)); }
  __device__ __forceinline__ Activated both(float g) const {
    const float s = __fdividef(1.f, 1.f + power(g));
    const float rest = g * (1.f - s) * polynomial(derivative, square(g));
    return {g * s, s * (1.f + rest)};
  }
};

// To fp32's own rounding: s is the logistic function of w, or Phi(g), whose tail is the density times a polynomial
// (Abramowitz and Stegun 26.2.17, off by 7.5e-8 at most). Both are computed, since multiply-adds take so long that
// nobody waits for these, and chosen by a number.
struct ExactActivation {
  float linear, cubic;  // of w / g in g^2
  float is_erf;         // 1 or 0

  static ExactActivation of(Activation activation) {
    if (activation == Activation::kGelu) return {0.f, 0.f, 1.f};
    if (activation == Activation::kGeluTanh) return {1.5957691216f, 0.0713548163f, 0.f};
    return {1.f, 0.f, 0.f};
  }
  __device__ __forceinline__ Activated both(float g) const {
    const float near = fminf(fmaxf(g, -100.f), 100.f), z = Logistic::square(g);
    const float logistic = 1.f / (1.f + expf(-near * fmaf(cubic, z, linear)));
    const float of_phi = 0.39894228f * expf(-0.5f * near * near);
    const float t = __fdividef(1.f, fmaf(0.2316419f, fabsf(near), 1.f));
    float tail = fmaf(fmaf(1.330274429f, t, -1.821255978f), t, 1.781477937f);
    tail = of_phi * t * fmaf(fmaf(tail, t, -0.356563782f), t, 0.319381530f);
    const float phi = near < 0.f ? tail : 1.f - tail;
    const float s = fmaf(is_erf, phi - logistic, logistic);
    const float of_logistic = logistic * (1.f - logistic) * fmaf(3.f * cubic, z, linear);
    return {g * s, s + g * fmaf(is_erf, of_phi - of_logistic, of_logistic)};
  }
  __device__ __forceinline__ float value(float g) const { return both(g).value; }
};

}  // namespace dsmoe::cuda

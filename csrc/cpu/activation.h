// What a gate does to its neurons' g = x Wg, and the derivative of that (kernels.h, Activation).
//
//   silu        g s(g)          s = sigmoid
//   gelu_tanh   g s(k(g))       k(g) = 2 sqrt(2/pi) (g + 0.044715 g^3): (1 + tanh z)/2 is s(2 z)
//   gelu        g P(g)          P: distribution function of the normal distribution
#pragma once

#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

template <class V>
struct Activated {
  V value, slope;
};

// P(-x) and the density at x >= 0. With e = exp(-x^2/2), P(-x)/e is smooth: a polynomial of
// t = 1/(1 + x/4) without constant term, fitted to a relative error below 5e-8 on [0, 13], where e
// comes to the smallest float.
template <class V>
struct NormalTail {
  V mass, density;
};
DSMOE_INLINE NormalTail<Vec<float>> normal_tail(Vec<float> x) {
  constexpr float kTerms[] = {0.0268920143f, -0.158600337f, 0.308355336f,
                              -0.22014243f,  0.211979867f,  0.0284182324f,
                              0.104948718f,  0.0983401374f, 0.0998084389f};
  x = x > splat(13.0f) ? splat(13.0f) : x;
  const Vec<float> t = 1 / fma(x, splat(0.25f), splat(1.0f)), e = exp(x * x * splat(-0.5f));
  Vec<float> sum = splat(kTerms[0]);
#pragma GCC unroll 8
  for (int i = 1; i < 9; ++i) sum = fma(sum, t, splat(kTerms[i]));
  return {e * t * sum, e * splat(0.398942280f)};
}
DSMOE_INLINE NormalTail<Vec<double>> normal_tail(Vec<double> x) {
  NormalTail<Vec<double>> out{x, exp(x * x * splat(-0.5)) * splat(0.39894228040143267794)};
  for (int i = 0; i < kVecBytes / 8; ++i)
    out.mass[i] = 0.5 * __builtin_erfc(x[i] * 0.70710678118654752440);
  return out;
}

template <Activation kActivation, class V>
DSMOE_INLINE Activated<V> activate(V g) {
  using C = std::remove_reference_t<decltype(g[0])>;
  if constexpr (kActivation == Activation::kSilu) {
    const V s = sigmoid(g);
    return {g * s, s * (1 + g * (1 - s))};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // beyond 16 s is 0 or 1, and the cube might be infinite
    V c = g > splat(C(16)) ? splat(C(16)) : g;
    c = c < splat(C(-16)) ? splat(C(-16)) : c;
    const V scale = splat(C(1.59576912160573071176)), cube = splat(C(0.044715)), square = c * c;
    const V s = sigmoid(scale * c * fma(square, cube, splat(C(1))));
    const V dk = scale * fma(square, 3 * cube, splat(C(1)));
    return {g * s, s * (1 + c * dk * (1 - s))};
  } else {
    const auto tail = normal_tail(g < 0 ? -g : g);
    const V p = g < 0 ? tail.mass : 1 - tail.mass;
    return {g * p, p + g * tail.density};
  }
}

// f(integral_constant) of a gate's activation.
template <class F>
DSMOE_INLINE void with_activation(Activation activation, F f) {
  using A = Activation;
  switch (activation) {
    case A::kSilu:
      return f(std::integral_constant<A, A::kSilu>{});
    case A::kGeluTanh:
      return f(std::integral_constant<A, A::kGeluTanh>{});
    case A::kGelu:
      return f(std::integral_constant<A, A::kGelu>{});
  }
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

// The vector layer: the only file that knows an instruction set. It is compiled once per ISA,
// always inside DSMOE_ISA_NAMESPACE, so that no code built with AVX-512 flags can end up in a
// symbol that other machines call.
//
//   C    the type that sums are kept in     double for fp64, float for everything else
//   Vec  one register of C                  kVecBytes wide (GNU vector extension)
//   A    element of the broadcast operand   what x and the activations are stored as in tiles
//   kPair                                   rows of B interleaved in one register: 2 for bf16
//                                           (VNNI pairs), else 1
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#ifndef DSMOE_ISA_NAMESPACE
#error "compile with -DDSMOE_ISA_NAMESPACE=<name>"
#endif

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

#define DSMOE_INLINE static inline __attribute__((always_inline))

// kMaxRows x 2 registers of sums, 2 of B and 1 broadcast of A must fit the register file: 12 x 2 +
// 3 of 32 zmm (12 rather than 14, because every row also needs a general register for its pointer),
// 6 x 2 + 3 of 16 ymm or xmm.
#if defined(__AVX512F__) || defined(DSMOE_EMULATE_AMX)
constexpr int kVecBytes = 64, kMaxRows = 12;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32, kMaxRows = 6;
#else
constexpr int kVecBytes = 16, kMaxRows = 6;
#endif

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class C>
struct VecType {
  typedef C type __attribute__((vector_size(kVecBytes)));
};
template <class C>
using Vec = typename VecType<C>::type;
typedef uint32_t VecU32 __attribute__((vector_size(kVecBytes)));
typedef int32_t VecI32 __attribute__((vector_size(kVecBytes)));

template <class T>
constexpr T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T max_of(T a, T b) {
  return a < b ? b : a;
}
constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
constexpr int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

// ------------------------------------------------------------------------------------------------
// scalar halves

DSMOE_INLINE float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
DSMOE_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
DSMOE_INLINE float widen(float v) {
  return v;
}
DSMOE_INLINE double widen(double v) {
  return v;
}
DSMOE_INLINE float widen(bf16 v) {
  return bits_to_float(uint32_t(v.bits) << 16);
}
DSMOE_INLINE float widen(fp16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude << 13));
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) *
                                            0x1p112f));  // exact, also for subnormals
}

DSMOE_INLINE void narrow(float v, float& out) {
  out = v;
}
DSMOE_INLINE void narrow(double v, double& out) {
  out = v;
}
DSMOE_INLINE void narrow(float v, bf16& out) {
  const uint32_t u = float_to_bits(v);
  out.bits = v != v ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
DSMOE_INLINE void narrow(float v, fp16& out) {
  const uint32_t u = float_to_bits(v), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000)
    half = 0x7e00;
  else if (magnitude >= 0x477ff000)  // 65520 rounds to infinity
    half = 0x7c00;
  else if (magnitude < 0x38800000)  // subnormal: adding 0.5 leaves the mantissa rounded at 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
  else
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  out.bits = uint16_t(sign | half);
}

// -------------------------------------------------------------------------------------------
// vector load and store

template <class V>
DSMOE_INLINE V load_raw(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
DSMOE_INLINE Vec<float> load(const float* p) {
  return load_raw<Vec<float>>(p);
}
DSMOE_INLINE Vec<double> load(const double* p) {
  return load_raw<Vec<double>>(p);
}
DSMOE_INLINE void store(float* p, Vec<float> v) {
  memcpy(p, &v, sizeof v);
}
DSMOE_INLINE void store(double* p, Vec<double> v) {
  memcpy(p, &v, sizeof v);
}

#if defined(__AVX512F__)
DSMOE_INLINE VecU32 widen_u16(const void* p) {
  return (VecU32)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
DSMOE_INLINE Vec<float> load(const fp16* p) {
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
DSMOE_INLINE __m256i halves(Vec<float> v, fp16) {
  return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
DSMOE_INLINE void store(fp16* p, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, halves(v, *p));
}
#elif defined(__AVX2__)
DSMOE_INLINE VecU32 widen_u16(const void* p) {
  return (VecU32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
}
DSMOE_INLINE Vec<float> load(const fp16* p) {
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
DSMOE_INLINE void store(fp16* p, Vec<float> v) {
  _mm_storeu_si128((__m128i*)p,
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
DSMOE_INLINE void store_low_halves(void* p, VecU32 v) {
  const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // per 128-bit lane
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}
#else
DSMOE_INLINE VecU32 widen_u16(const void* p) {
  uint16_t h[kVecBytes / 4];
  VecU32 v;
  memcpy(h, p, sizeof h);
  for (int i = 0; i < kVecBytes / 4; ++i) v[i] = h[i];
  return v;
}
DSMOE_INLINE Vec<float> load(const fp16* p) {
  Vec<float> v;
  for (int i = 0; i < kVecBytes / 4; ++i) v[i] = widen(p[i]);
  return v;
}
DSMOE_INLINE void store(fp16* p, Vec<float> v) {
  for (int i = 0; i < kVecBytes / 4; ++i) narrow(v[i], p[i]);
}
DSMOE_INLINE void store_low_halves(void* p, VecU32 v) {
  uint16_t h[kVecBytes / 4];
  for (int i = 0; i < kVecBytes / 4; ++i) h[i] = uint16_t(v[i]);
  memcpy(p, h, sizeof h);
}
#endif

// Round to nearest even; the bits stand in the low half of each lane.
DSMOE_INLINE VecU32 bf16_bits(Vec<float> v) {
  const VecU32 u = (VecU32)v;
  const VecU32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return v == v ? rounded : (VecU32{} + 0x7fc0);
}
DSMOE_INLINE Vec<float> load(const bf16* p) {
  return (Vec<float>)(widen_u16(p) << 16);
}
#if defined(__AVX512F__)
DSMOE_INLINE __m256i halves(Vec<float> v, bf16) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh((__m512)v);  // subnormals become 0, as in vdpbf16ps
#else
  return _mm512_cvtepi32_epi16((__m512i)bf16_bits(v));
#endif
}
DSMOE_INLINE void store(bf16* p, Vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, halves(v, *p));
}
#else
DSMOE_INLINE void store(bf16* p, Vec<float> v) {
  store_low_halves(p, bf16_bits(v));
}
#endif

DSMOE_INLINE Vec<double> splat(double a) {
  Vec<double> v;
  for (int i = 0; i < kVecBytes / 8; ++i) v[i] = a;
  return v;
}
DSMOE_INLINE Vec<float> splat(
    float a) {  // an intrinsic: GCC does not always see a broadcast in the loop
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_set1_ps(a);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_set1_ps(a);
#else
  Vec<float> v;
  for (int i = 0; i < kVecBytes / 4; ++i) v[i] = a;
  return v;
#endif
}
DSMOE_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return a * b + c;
}
#if defined(__AVX512F__)
DSMOE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(__AVX2__)
DSMOE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
DSMOE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return a * b + c;
}
#endif

// ----------------------------------------------------------------------------------------------------
// exp, sigmoid

// e^v = 2^n e^r, |r| <= ln2/2, n rounded by adding 1.5 * 2^23; the polynomial's relative error is
// below 1e-7. The clamps keep 2^n finite; comparisons with NaN are false, so NaN passes through.
DSMOE_INLINE Vec<float> exp(Vec<float> v) {
  const Vec<float> high = splat(88.0f), low = splat(-87.0f), magic = splat(12582912.0f);
  v = v > high ? high : v;
  v = v < low ? low : v;
  const Vec<float> shifted = fma(v, splat(1.44269504f), magic);
  const Vec<float> n = shifted - magic;
  const Vec<float> r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), v));
  Vec<float> p = splat(1.3888889e-3f);
  p = fma(p, r, splat(8.3333333e-3f));
  p = fma(p, r, splat(4.1666667e-2f));
  p = fma(p, r, splat(1.6666667e-1f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  const VecI32 scale = ((VecI32)shifted + (127 - 0x4b400000)) << 23;
  return p * (Vec<float>)scale;
}
DSMOE_INLINE Vec<double> exp(Vec<double> v) {
  for (int i = 0; i < kVecBytes / 8; ++i) v[i] = __builtin_exp(v[i]);
  return v;
}
template <class V>
DSMOE_INLINE V sigmoid(V v) {
  return 1 / (1 + exp(-v));
}

// -------------------------------------------------------------------------------------------------
// multiply traits

// How a dtype multiplies: load_b() reads a register of B (of pairs that are widened, one half), bcast() one element (or pair) of A, mac()
// adds their product. kSub is how many multiplications one step of K takes; A moves kPair elements
// per step.
template <class T>
struct Compute {  // fp32, fp64, and fp16 widened on load
  using C = float;
  using A = float;
  using B = Vec<float>;
  static constexpr int kPair = 1, kSub = 1;
  DSMOE_INLINE B load_b(const T* p, int) { return load(p); }
  DSMOE_INLINE Vec<float> bcast(const A* p) { return splat(*p); }
  DSMOE_INLINE Vec<float> mac(Vec<float> a, B b, Vec<float> c) { return fma(a, b, c); }
};
template <>
struct Compute<double> {
  using C = double;
  using A = double;
  using B = Vec<double>;
  static constexpr int kPair = 1, kSub = 1;
  DSMOE_INLINE B load_b(const double* p, int) { return load(p); }
  DSMOE_INLINE Vec<double> bcast(const A* p) { return splat(*p); }
  DSMOE_INLINE Vec<double> mac(Vec<double> a, B b, Vec<double> c) { return fma(a, b, c); }
};
#if defined(__AVX512BF16__)
template <>
struct Compute<bf16> {  // vdpbf16ps multiplies pairs
  using C = float;
  using A = bf16;
  using B = __m512i;
  static constexpr int kPair = 2, kSub = 1;
  DSMOE_INLINE B load_b(const bf16* p, int) { return _mm512_loadu_si512(p); }
  DSMOE_INLINE __m512i bcast(const A* p) {
    int32_t pair;
    memcpy(&pair, p, 4);
    return _mm512_set1_epi32(pair);
  }
  DSMOE_INLINE Vec<float> mac(__m512i a, B b, Vec<float> c) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
};
#elif defined(DSMOE_EMULATE_AMX)
template <>
struct Compute<bf16> {  // the same on plain vectors: beside tiles A is bf16
  using C = float;
  using A = bf16;
  using B = VecU32;
  static constexpr int kPair = 2, kSub = 1;
  DSMOE_INLINE B load_b(const bf16* p, int) { return load_raw<VecU32>(p); }
  DSMOE_INLINE VecU32 bcast(const A* p) {
    uint32_t pair;
    memcpy(&pair, p, 4);
    return VecU32{} + pair;
  }
  DSMOE_INLINE Vec<float> mac(VecU32 a, B b, Vec<float> c) {
    c = fma((Vec<float>)(a & 0xffff0000u), (Vec<float>)(b & 0xffff0000u), c);
    return fma((Vec<float>)(a << 16), (Vec<float>)(b << 16), c);
  }
};
#else
template <>
struct Compute<bf16> {  // the same pairs in memory, widened with one shift or mask each
  using C = float;
  using A = float;
  using B = Vec<float>;
  static constexpr int kPair = 2, kSub = 2;
  DSMOE_INLINE B load_b(const bf16* p, int sub) {
    const VecU32 pairs = load_raw<VecU32>(p);
    return (Vec<float>)(sub == 0 ? pairs << 16 : pairs & 0xffff0000u);
  }
  DSMOE_INLINE Vec<float> bcast(const A* p) { return splat(*p); }
  DSMOE_INLINE Vec<float> mac(Vec<float> a, B b, Vec<float> c) { return fma(a, b, c); }
};
#endif

template <class T>
using CType = typename Compute<T>::C;
template <class T>
using AType = typename Compute<T>::A;
template <class T>
constexpr int kLanes = kVecBytes / int(sizeof(CType<T>));  // columns per register
template <class T>
constexpr int kColumns = 2 * kLanes<T>;  // columns per panel: every tile is two registers wide

// v's lanes below count; 0, whatever was there, in the others.
template <class C>
DSMOE_INLINE Vec<C> first_lanes(Vec<C> v, int64_t count) {
  if (count >= kLanes<C>) return v;
  static constexpr C kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kIndex) < splat(C(count)) ? v : Vec<C>{};
}

// A pair of bf16 rows as dwords, for operands that are interleaved along K.
DSMOE_INLINE void store_pair(bf16* p, Vec<float> first, Vec<float> second) {
#if defined(__AVX512BF16__)
  const __m512i v =
      _mm512_or_si512(_mm512_cvtepu16_epi32(halves(first, *p)),
                      _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves(second, *p)), 16));
#else
  const VecU32 v = bf16_bits(first) | (bf16_bits(second) << 16);
#endif
  memcpy(p, &v, sizeof v);
}

// After streaming stores, before other threads may look.
DSMOE_INLINE void stream_fence() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Two registers side by side; with stream, around the caches (p aligned to their width).
template <class T>
DSMOE_INLINE void store_both(T* p, Vec<CType<T>> first, Vec<CType<T>> second, bool stream) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    const __m512i v =
        _mm512_inserti64x4(_mm512_castsi256_si512(halves(first, *p)), halves(second, *p), 1);
    if (stream) return _mm512_stream_si512((__m512i*)p, v);
    memcpy(p, &v, sizeof v);
    return;
  } else if (stream) {
    _mm512_stream_si512((__m512i*)p, (__m512i)first);
    return _mm512_stream_si512((__m512i*)(p + kLanes<T>), (__m512i)second);
  }
#endif
  (void)stream;
  store(p, first);
  store(p + kLanes<T>, second);
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

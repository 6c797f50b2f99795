// Panels of codes (quantized_layout.h) against a few rows of digits (digits.h):
//
//   C[rows, 2 registers] = sum over blocks of (scale_x sum_k d_k code_k) scale_w + (sum_k x_k) min_w
//
// Few rows wait for the weights, so codes are multiplied as they come from memory: one instruction for 64
// codes and each digit (vpdpbusd), where widening to fp32 takes eight and would be slower than memory at one
// row already. Sums of a block are integers and exact, whatever their order; blocks are added in fp32.
// Many rows instead have a panel turned into the operand of gemm_tile.h once (dequantize) and take its tiles.
#pragma once

#include <type_traits>

#include "digits.h"
#include "gemm_tile.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

// Codes of kDotTerms terms of one register of columns, and acc + the sums of their products with digits.
#if defined(__AVX512VNNI__)
using Codes = __m512i;
DSMOE_INLINE Codes load_codes(const char* line) {
  return _mm512_loadu_si512(line);
}
DSMOE_INLINE Codes low_codes(Codes v) {
  return _mm512_and_si512(v, _mm512_set1_epi8(15));
}
DSMOE_INLINE Codes high_codes(Codes v) {
  return low_codes(_mm512_srli_epi16(v, 4));
}
DSMOE_INLINE VecI32 dot(Codes codes, const Digit* digits, VecI32 acc) {
  int32_t four;
  memcpy(&four, digits, 4);
  return (VecI32)_mm512_dpbusd_epi32((__m512i)acc, codes, _mm512_set1_epi32(four));
}
#elif defined(__AVX512F__)
using Codes = __m512i;
DSMOE_INLINE Codes load_codes(const char* line) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)line));
}
DSMOE_INLINE Codes low_codes(Codes v) {
  return _mm512_and_si512(v, _mm512_set1_epi16(15));
}
DSMOE_INLINE Codes high_codes(Codes v) {
  return _mm512_srli_epi16(v, 4);
}
DSMOE_INLINE VecI32 dot(Codes codes, const Digit* digits, VecI32 acc) {
  int32_t two;
  memcpy(&two, digits, 4);
  return acc + (VecI32)_mm512_madd_epi16(codes, _mm512_set1_epi32(two));
}
#elif defined(__AVX2__)
using Codes = __m256i;
DSMOE_INLINE Codes load_codes(const char* line) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)line));
}
DSMOE_INLINE Codes low_codes(Codes v) {
  return _mm256_and_si256(v, _mm256_set1_epi16(15));
}
DSMOE_INLINE Codes high_codes(Codes v) {
  return _mm256_srli_epi16(v, 4);
}
DSMOE_INLINE VecI32 dot(Codes codes, const Digit* digits, VecI32 acc) {
  int32_t two;
  memcpy(&two, digits, 4);
  return acc + (VecI32)_mm256_madd_epi16(codes, _mm256_set1_epi32(two));
}
#else
using Codes = VecU32;  // a pair of words in each dword
DSMOE_INLINE Codes load_codes(const char* line) {
  const VecU32 pairs = widen_u16(line);
  return (pairs & 255) | (pairs >> 8 << 16);
}
DSMOE_INLINE Codes low_codes(Codes v) {
  return v & 0xf000f;
}
DSMOE_INLINE Codes high_codes(Codes v) {
  return v >> 4 & 0xf000f;
}
DSMOE_INLINE VecI32 dot(Codes codes, const Digit* digits, VecI32 acc) {
  return acc + (VecI32)(codes & 0xffff) * digits[0] + (VecI32)(codes >> 16) * digits[1];
}
#endif

DSMOE_INLINE Vec<float> to_float(VecI32 v) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtepi32_ps((__m512i)v);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_cvtepi32_ps((__m256i)v);
#else
  return __builtin_convertvector(v, Vec<float>);
#endif
}

// So many rows of an expert are multiplied as digits.
constexpr int64_t kFewRows = kMaxRows;
template <class T>
constexpr bool kHasCodes = !std::is_same_v<T, double>;

// Rows at once: with two digits 4 x 2 x 2 registers of sums of 32, with one 4 x 2 of 16.
template <class T>
constexpr int kDigitRows = kVecBytes == 64 || kDigits<T> == 1 ? 4 : 2;

// A row's sum of a block, put together from those of its digits.
template <class T>
DSMOE_INLINE Vec<float> from_digits(const VecI32 (&sums)[kDigits<T>]) {
  constexpr int kN = kDigits<T>, kShift = kDigitBits<T>;
  if constexpr (kN == 1) return to_float(sums[0]);
  if constexpr (kN == 2 && sizeof(T) == 2) return to_float(sums[0] * (1 << kShift) + sums[1]);
  Vec<float> v = to_float(sums[0]);
#pragma GCC unroll 2
  for (int d = 1; d < kN; ++d) v = fma(v, splat(float(1 << kShift)), to_float(sums[d]));
  return v;
}

// One panel times R rows of x: c[r * stride ..], two registers each.
template <class T, int Bits, int R>
__attribute__((noinline)) static void digit_tile(const char* panel, const QuantizedPanels& b,
                                                 const DigitRows<T>& x, const int32_t* rows,
                                                 float* c, int64_t stride) {
  constexpr int kN = kDigits<T>, kSteps = Bits == 4 ? 2 : 1;  // steps of a line
  constexpr int64_t kAhead = 4096;
  const int64_t width = b.block_terms(), blocks = b.blocks();
  const bool has_scales = b.format.group_size != 0, has_min = b.format.has_min;
  const Digit* digits[R];
  const DigitBlock<T>* block[R];
  for (int r = 0; r < R; ++r) {
    digits[r] = x.digits + rows[r] * x.stride();
    block[r] = x.block + rows[r] * blocks;
  }
  Vec<float> sums[R][2] = {};
  for (int64_t i = 0; i < blocks; ++i) {
    VecI32 acc[R][2][kN];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
      for (int d = 0; d < kN; ++d) acc[r][0][d] = acc[r][1][d] = VecI32{} + block[r][i].start[d];
    const int64_t lines = b.lines(b.terms_of(i));
    int64_t at = i * kN * width;
#pragma GCC unroll 2
    for (int64_t line = 0; line < lines; ++line, at += kSteps * kDotTerms) {
      const Codes loaded[2] = {load_codes(panel), load_codes(panel + kLineBytes)};
      __builtin_prefetch(panel + kAhead, 0, 3);
      if (2 * kLineBytes > 64) __builtin_prefetch(panel + kAhead + 64, 0, 3);
      panel += 2 * kLineBytes;
#pragma GCC unroll 2
      for (int step = 0; step < kSteps; ++step) {
        Codes codes[2];
#pragma GCC unroll 2
        for (int w = 0; w < 2; ++w)
          codes[w] = Bits == 8 ? loaded[w] : step ? high_codes(loaded[w]) : low_codes(loaded[w]);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
          for (int d = 0; d < kN; ++d) {
            const Digit* of_row = digits[r] + at + d * width + step * kDotTerms;
            acc[r][0][d] = dot(codes[0], of_row, acc[r][0][d]);
            acc[r][1][d] = dot(codes[1], of_row, acc[r][1][d]);
          }
      }
    }
    const fp16* numbers = (const fp16*)panel;
    panel += b.number_bytes();
#pragma GCC unroll 2
    for (int w = 0; w < 2; ++w) {
      if (!has_scales) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sums[r][w] = fma(from_digits<T>(acc[r][w]), splat(block[r][i].scale), sums[r][w]);
        continue;
      }
      const Vec<float> scale = load(numbers + w * kCodeLanes);
      const Vec<float> least = has_min ? load(numbers + (2 + w) * kCodeLanes) : Vec<float>{};
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Vec<float> scaled = from_digits<T>(acc[r][w]) * splat(block[r][i].scale);
        sums[r][w] = fma(scaled, scale, sums[r][w]);
        if (has_min) sums[r][w] = fma(splat(block[r][i].sum), least, sums[r][w]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    store(c + r * stride, sums[r][0]);
    store(c + r * stride + kCodeLanes, sums[r][1]);
  }
}

template <class T, int Bits, int R = 1>
static void run_digit_tile(int count, const char* panel, const QuantizedPanels& b,
                           const DigitRows<T>& x, const int32_t* rows, float* c, int64_t stride) {
  if constexpr (R < kDigitRows<T>) {
    if (count != R) return run_digit_tile<T, Bits, R + 1>(count, panel, b, x, rows, c, stride);
  }
  digit_tile<T, Bits, R>(panel, b, x, rows, c, stride);
}

// One panel times these rows of x.
template <class T>
static void multiply_codes(const char* panel, const QuantizedPanels& b, const DigitRows<T>& x,
                           const int32_t* rows, int64_t count, float* c, int64_t stride) {
  for (int64_t r = 0; r < count; r += kDigitRows<T>) {
    const int now = int(min_of<int64_t>(kDigitRows<T>, count - r));
    if (b.format.bits == 8)
      run_digit_tile<T, 8>(now, panel, b, x, rows + r, c + r * stride, stride);
    else
      run_digit_tile<T, 4>(now, panel, b, x, rows + r, c + r * stride, stride);
  }
}

// ------------------------------------------------------------------------------------------------
// many rows

// Term j of a line as 1 + code / 2^Bits: the code's bits become the mantissa's first.
template <int Bits>
DSMOE_INLINE Vec<float> code_term(VecU32 line, int j) {
  const int at = 8 * (j % kDotTerms) + (j / kDotTerms) * 4, to = 23 - Bits;
  const VecU32 moved = at > to ? line >> (at - to) : line << (to - at);
  return (Vec<float>)((moved & (((1u << Bits) - 1) << to)) | 0x3f800000u);
}
DSMOE_INLINE VecU32 load_line(const char* line) {
  if constexpr (kDotTerms == 4) return load_raw<VecU32>(line);
  return widen_u16(line);
}
DSMOE_INLINE void store_terms(float* out, Vec<float> first, Vec<float> second) {
  store(out, first);
  store(out + kColumns<float>, second);
}
DSMOE_INLINE void store_terms(fp16* out, Vec<float> first, Vec<float> second) {
  store(out, first);
  store(out + kColumns<float>, second);
}
DSMOE_INLINE void store_terms(bf16* out, Vec<float> first, Vec<float> second) {
  const VecU32 low = ((VecU32)first + 0x8000) >> 16, high = (VecU32)second + 0x8000;  // rounded
  const VecU32 pair = low | (high & 0xffff0000u);
  memcpy(out, &pair, sizeof pair);
}

// Blocks begin to end of a panel as B of gemm_tile.h: out[K / kPair][kColumns][kPair]. Codes of 8 bits
// without scales of groups are exact in every type.
template <class T, int Bits>
static void dequantize_blocks(const char* panel, const QuantizedPanels& b, int64_t begin,
                              int64_t end, T* out) {
  constexpr int kPair = Compute<T>::kPair, kTerms = kDotTerms * (Bits == 4 ? 2 : 1);
  constexpr int64_t kStep = kColumns<T> * kPair;
  constexpr float kCodes = 1 << Bits,
                  kShift = 1.5f * kCodes;  // a term is 1 + (code + kZero) / kCodes
  const bool has_scales = b.format.group_size != 0, has_min = b.format.has_min;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t terms = b.terms_of(i), whole = terms / kTerms, rest = terms % kTerms;
    const char* from = panel + b.block_start(i);
    const fp16* numbers = (const fp16*)(from + b.code_bytes(terms));
    T* const block_out = out + i * b.block_terms() / kPair * kStep;
    for (int w = 0; w < 2; ++w) {
      Vec<float> scale = splat(kCodes), least = splat(-kShift);
      if (has_scales) {
        const Vec<float> step = load(numbers + w * kCodeLanes);
        scale = step * kCodes;
        least = has_min ? load(numbers + (2 + w) * kCodeLanes) - step * kShift : step * -kShift;
      }
      const char* line = from + w * kLineBytes;
      T* to = block_out + w * kCodeLanes * kPair;
      for (int64_t n = 0; n < whole; ++n, line += 2 * kLineBytes, to += kTerms / kPair * kStep) {
        const VecU32 codes = load_line(line);
#pragma GCC unroll 4
        for (int j = 0; j < kTerms; j += 2)
          store_terms(to + j / kPair * kStep, fma(code_term<Bits>(codes, j), scale, least),
                      fma(code_term<Bits>(codes, j + 1), scale, least));
      }
      if (rest == 0) continue;
      const VecU32 codes = load_line(line);
      for (int j = 0; j < rest; j += kPair) {
        const Vec<float> first = fma(code_term<Bits>(codes, j), scale, least);
        const Vec<float> second = fma(code_term<Bits>(codes, j + 1), scale, least);
        if constexpr (kPair == 2)
          store_terms(to + j / 2 * kStep, first, j + 1 < rest ? second : Vec<float>{});
        else
          store(to + j * kStep, first);
      }
    }
  }
}

template <class T>
static void dequantize(const char* panel, const QuantizedPanels& b, int64_t begin, int64_t end,
                       T* out) {
  if (b.format.bits == 8)
    dequantize_blocks<T, 8>(panel, b, begin, end, out);
  else
    dequantize_blocks<T, 4>(panel, b, begin, end, out);
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

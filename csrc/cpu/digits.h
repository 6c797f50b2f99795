// Rows of x or of activations as integers, for products with codes of weights (quantized_tile.h):
//
//   x = scale (d_0 B^(n-1) + .. + d_(n-1)),  one power of two as scale for each block of K
//
// Half types get 16 bits, fp32 24, in digits as wide as the multiply-add instruction takes: bytes for vpdpbusd
// (B = 2^8), else words for vpmaddwd (fp32: B = 2^12). A bf16 number is exact unless it is 2^7 times smaller
// than the largest of its block; smaller ones have an error of 2^-16 of that, fp32 2^-24. A block that holds
// an infinity or NaN becomes NaN.
#pragma once

#include "quantized_layout.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

#if defined(__AVX512VNNI__)
using Digit = int8_t;
template <class T>
constexpr int kDigits = sizeof(T) == 2 ? 2 : 3;
template <class T>
constexpr int kDigitBits = 8;
#else
using Digit = int16_t;
template <class T>
constexpr int kDigits = sizeof(T) == 2 ? 1 : 2;
template <class T>
constexpr int kDigitBits = sizeof(T) == 2 ? 16 : 12;
#endif
template <class T>
constexpr int kNumberBits = sizeof(T) == 2 ? 16 : 24;  // 2^(this - 2) is the largest magnitude

template <class T>
struct DigitBlock {
  float scale, sum;  // sum: of the block's x
  int32_t
      start[kDigits<T>];  // -kZero times the sum of each digit: codes are stored with kZero added
};

// A matrix of n rows, K = terms: digits[row][block][digit][block_terms], and what each block has besides.
template <class T>
struct DigitRows {
  int64_t terms, block_terms;
  Digit* digits = nullptr;
  DigitBlock<T>* block = nullptr;
  int64_t blocks() const { return ceil_div(terms, block_terms); }
  int64_t stride() const { return blocks() * kDigits<T> * block_terms; }  // of a row, in digits
};

// One row of DigitRows. zero: kZero of the codes.
template <class T, class V>
static void to_digits(const V* x, int zero, const DigitRows<T>& rows, int64_t row) {
  constexpr int kShift = kDigitBits<T>, kHalf = 1 << (kShift - 1);
  Digit* out = rows.digits + row * rows.stride();
  DigitBlock<T>* block = rows.block + row * rows.blocks();
  const int64_t width = rows.block_terms;
  alignas(64) float values[kCodeBlock];
  for (int64_t first = 0; first < rows.terms; first += width, ++block, out += kDigits<T> * width) {
    const int64_t count = min_of(width, rows.terms - first);
    for (int64_t i = 0; i < count; ++i) values[i] = widen(x[first + i]);
    for (int64_t i = count; i < width; ++i) values[i] = 0;
    uint32_t most = 0;  // of magnitudes' bits: NaN is above all
    for (int64_t i = 0; i < width; ++i) {
      const uint32_t magnitude = float_to_bits(values[i]) & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    const bool is_finite = most < 0x7f800000;
    // Below 2^(exponent - 126); the scale's inverse must be a normal number too.
    const uint32_t exponent = is_finite ? max_of<uint32_t>(most >> 23, kNumberBits<T>) : 127;
    const float scale = bits_to_float((exponent + 3 - kNumberBits<T>) << 23);
    const float inverse = bits_to_float((254 - (exponent + 3 - kNumberBits<T>)) << 23);
    int32_t number[kCodeBlock], sums[kDigits<T>] = {}, total = 0;
    for (int64_t i = 0; i < width;
         ++i) {  // rounded by adding 1.5 * 2^23, after which they are the low bits
      const float scaled = (is_finite ? values[i] : 0) * inverse;
      number[i] = int32_t(float_to_bits(scaled + 12582912.f)) - 0x4b400000;
      total += number[i];
    }
    for (int d = kDigits<T> - 1; d >= 0; --d) {
      for (int64_t i = 0; i < width; ++i) {
        const int32_t rest = d ? (number[i] + kHalf) >> kShift : 0;
        const int32_t digit = number[i] - rest * (1 << kShift);
        number[i] = rest;
        out[d * width + i] = Digit(digit);
        sums[d] += digit;
      }
    }
    block->scale = is_finite ? scale : __builtin_nanf("");
    block->sum = block->scale * float(total);
    for (int d = 0; d < kDigits<T>; ++d) block->start[d] = -zero * sums[d];
  }
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

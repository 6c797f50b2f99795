// The format Codes: weights of 8 or 4 bits, w = scale code (+ min), for decode.cu.
//
// A code becomes a number by bits alone, one byte permute: where a float's fraction is, below the exponent
// of 1 or 1/2, the code c is
//
//   raw = base + (c + zero) / steps     8 bits: 1 + (c + 128) / 2^15     4 bits: 1/2 + (c + 8) / 2^8
//
// and the weight is raw * slope + start, one multiply-add, rounded to x's dtype as torch rounds the weights
// that it makes of codes:
//
//   slope = scale steps,  start = min - scale (base steps + zero)
//
// exact where there is no min, since a scale has 11 bits and base steps + zero at most 9. Scales of output
// channels wait for the sums: then the numbers are the codes themselves. (Numbers made of integers by bits, not by conversions at a
// quarter of the rate, are FasterTransformer's and Marlin's idea, in half types.)
//
// Rows are as files have them; a lane's 16 bytes are 16 or 32 terms of one group, so that H is a multiple of these.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cuda/decode_steps.cuh"

namespace dsmoe::cuda {

constexpr int kUnitsOfCodes = 2;  // of one expert, hence of one group: a step of `outputs`

template <int kBits>
struct Code;

template <>
struct Code<8> {
  static constexpr float kSteps = 1 << 15, kStart = (1 << 15) + 128;
  // Byte i as the second of a float.
  __device__ __forceinline__ static float raw(uint32_t word, int i) {
    return __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x3f80, 0x5406 | i << 4));
  }
};

template <>
struct Code<4> {
  static constexpr float kSteps = 1 << 8, kStart = (1 << 7) + 8;
  // Half a byte as the third byte of a float.
  __device__ __forceinline__ static float raw(uint32_t word, int i) {
    const uint32_t halves = (i % 2 == 0 ? word : word >> 4) & 0x0f0f0f0fu;
    return __uint_as_float(__byte_perm(halves, 0x3f, 0x4055 | i / 2 << 8));
  }
};

// What makes weights of one group's codes; without scale and min it makes numbers of the codes.
template <int kBits>
struct Group {
  float slope = Code<kBits>::kSteps, start = -Code<kBits>::kStart;
  Group() = default;
  __device__ __forceinline__ Group(__half scale, __half min)
      : slope(__half2float(scale) * Code<kBits>::kSteps),
        start(fmaf(__half2float(scale), -Code<kBits>::kStart, __half2float(min))) {}
  __device__ __forceinline__ float weight(uint32_t word, int i) const {
    return fmaf(Code<kBits>::raw(word, i), slope, start);
  }
};

// A matrix's codes and its numbers, as kernels.h has them.
template <int kBits, bool kHasGroups>
struct CodedMatrix {
  const unsigned char* codes;
  const void* scales;  // float of output channels, __half of groups
  const __half* mins;  // or null
  int64_t row_bytes;
  int group_size, groups_of_row;
  uint32_t inverse;  // 2^32 / group_size, rounded up

  CodedMatrix() = default;
  CodedMatrix(const QuantizedMatrix& m, const ExpertMlpQuantizedParams& q)
      : codes(reinterpret_cast<const unsigned char*>(m.codes)),
        scales(m.scales),
        mins(static_cast<const __half*>(m.mins)),
        row_bytes(bytes_of(q.forward.hidden_size)),
        group_size(q.format.group_size) {
    if (!kHasGroups) return;
    groups_of_row = static_cast<int>(ceil_div<int64_t>(q.forward.hidden_size, group_size));
    inverse = static_cast<uint32_t>(ceil_div<int64_t>(int64_t{1} << 32, group_size));
  }

  struct Row {
    const unsigned char* codes;  // null: zeros
    int first_group;
  };
  __host__ __device__ static int64_t bytes_of(int64_t columns) { return columns * kBits >> 3; }
  __device__ __forceinline__ Row at(int, int64_t neuron) const {
    return {codes + neuron * row_bytes, static_cast<int>(neuron) * groups_of_row};
  }
  // A division: exact where position * group_size < 2^32 (reads_codes).
  __device__ __forceinline__ int group(int64_t position) const {
    return __umulhi(static_cast<uint32_t>(position), inverse);
  }
  __device__ __forceinline__ int groups_of(int size) const { return group(size + group_size - 1); }
  __device__ __forceinline__ int64_t place(int, int64_t neuron) const { return neuron * row_bytes; }
  // of an output channel, and of four
  __device__ __forceinline__ float channel_scale(int64_t channel) const {
    return __ldg(static_cast<const float*>(scales) + channel);
  }
  __device__ __forceinline__ float4 channel_scales(int64_t first) const {
    return __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(scales) + first));
  }
};

template <class T, int kBits, bool kHasGroups>
struct Codes {
  using Number = T;
  using Matrix = CodedMatrix<kBits, kHasGroups>;
  using Down = Matrix;
  static constexpr int kTerms = 128 / kBits;
  static constexpr int kAhead = kBits / 2;  // 1024 terms for the CTA, twice those of Numbers
  static constexpr int kUnitsTogether = kUnitsOfCodes;
  static constexpr bool kGroups = kHasGroups, kScalesSums = !kHasGroups;

  struct Chunk {
    uint4 codes;
    __half scale, min;

    __device__ __forceinline__ void load(const Matrix& m, const typename Matrix::Row& row,
                                         int64_t column, int64_t end) {
      const bool exists = row.codes != nullptr && column < end;
      codes = exists ? __ldg(reinterpret_cast<const uint4*>(row.codes + Matrix::bytes_of(column)))
                     : uint4{};
      if constexpr (kHasGroups) {
        const int at = row.first_group + m.group(column);
        scale = exists ? __ldg(static_cast<const __half*>(m.scales) + at) : __half{};
        min = exists && m.mins != nullptr ? __ldg(m.mins + at) : __half{};
      }
    }
    __device__ __forceinline__ uint4 terms(int part) const {
      Group<kBits> group;
      if constexpr (kHasGroups) group = {scale, min};
      const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int at = part * 8 + i, word = at * kBits / 32, in_word = at % (32 / kBits);
        pairs[i / 2] =
            pack(group.weight(words[word], in_word), group.weight(words[word], in_word + 1), T());
      }
      return {pairs[0], pairs[1], pairs[2], pairs[3]};
    }
  };
};

// A step of `outputs`, 16 terms: two units of one expert. Lane (g, q) has rows 2q and 2q + 1 of both, eight
// columns from 8 g: 8 or 4 bytes, of which the lanes of a row have whole sectors.
template <class T, int kBits, bool kHasGroups>
struct StepOfCodes {
  using Format = Codes<T, kBits, kHasGroups>;
  static constexpr int kUnits = 2;
  static constexpr int kAtOnce = kBits == 8 ? 2 : 3;  // 64 or 48 bytes of codes in flight
  using Piece = std::conditional_t<kBits == 8, uint2, uint32_t>;
  int64_t place;  // looked up a round before its rows; no rows beyond the last step
  int rows, group;
  Piece row[4];
  uint4 scales, mins;  // of eight columns

  __device__ __forceinline__ void look_up(const DecodeArgs<Format>& args, int step, int end, int) {
    rows = 0;
    if (step >= end) return;
    const Unit* units = args.units + 2 * step;
    place = units[0].place;
    rows = units[0].rows + max(units[1].rows, 0);
    if constexpr (kHasGroups) group = units[0].group;
  }

  __device__ __forceinline__ void load(const DecodeArgs<Format>& args, int64_t column) {
    using Matrix = typename Format::Matrix;
    const Matrix& m = args.down;
    const int q = threadIdx.x % 4;
    const int64_t of_lane = Matrix::bytes_of(column) + 2 * q * m.row_bytes;  // in every step
    const int end = column < args.hidden_size ? rows : 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int neuron = i / 2 * kUnit + i % 2;
      const auto* from = m.codes + of_lane + neuron * m.row_bytes + place;
      row[i] = neuron + 2 * q < end ? __ldg(reinterpret_cast<const Piece*>(from)) : Piece{};
    }
    if constexpr (kHasGroups) {
      const int64_t at = group * args.hidden_size + column;
      const auto* numbers = static_cast<const __half*>(m.scales);
      scales = row_chunk(end > 0 ? numbers + at : nullptr, 0, 8);
      mins = row_chunk(end > 0 && m.mins != nullptr ? m.mins + at : nullptr, 0, 8);
    }
  }

  __device__ __forceinline__ void add(float (&sums)[8][4], const DecodeArgs<Format>& args,
                                      int step) const {
    uint32_t a[4];
    load_activations(a, args.activations, step);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      Group<kBits> of_column;
      if constexpr (kHasGroups) of_column = {number(scales, j), number(mins, j)};
      uint32_t pairs[2];
#pragma unroll
      for (int unit = 0; unit < 2; ++unit) {
        pairs[unit] = pack(of_column.weight(word(row[2 * unit], j), j % (32 / kBits)),
                           of_column.weight(word(row[2 * unit + 1], j), j % (32 / kBits)), T());
      }
      mma(sums[j], a, pairs[0], pairs[1], T());
    }
  }

  __device__ __forceinline__ static uint32_t word(const Piece& piece, int j) {
    return reinterpret_cast<const uint32_t*>(&piece)[j * kBits / 32];
  }
  __device__ __forceinline__ static __half number(const uint4& eight, int j) {
    return reinterpret_cast<const __half*>(&eight)[j];
  }
};

inline bool reads_codes(const ExpertMlpQuantizedParams& q) {
  const QuantFormat& f = q.format;
  const ExpertMlpParams& p = q.forward;
  const int64_t most = std::max(p.hidden_size, p.intermediate_size + f.group_size);
  return (f.bits == 8 || (f.bits == 4 && f.group_size != 0)) &&
         (f.group_size == 32 || (f.group_size >= 0 && f.group_size % 64 == 0)) &&
         most * f.group_size < int64_t{1} << 32 && p.hidden_size % (128 / f.bits) == 0;
}

}  // namespace dsmoe::cuda

// What decode.cu's kernels work on, the format Numbers: weights of x's dtype (decode_codes.cuh has another one), and a
// step of `outputs` for either way in which a model keeps Wd:
//
//   StepOfRows      [I,H]             16 terms: 2 units; a lane loads 8 columns of 4 neurons
//   StepOfColumns   [H,I], [E,H,S]    32 terms: 4 units; a lane loads 8 neurons of 8 columns
//
// Of both, the lane (g, q) gets the sums of column 8 (2 q + i) + j of a strip of 64: sums[j][2 half + i], of token
// g + 8 half.
#pragma once

#include "cuda/activation.cuh"
#include "cuda/decode.cuh"
#include "cuda/mma_sm80.cuh"
#include "cuda/weight_rows.cuh"

namespace dsmoe::cuda {

constexpr int kUnit = 8;  // neurons, the columns of one mma
constexpr int kStripColumns = 64;

struct Unit {
  int64_t place;  // of the first neuron in Wd
  int rows;       // 1 .. 8; 0 or less: none
  int group;      // its row of Wd's scales, where they are of groups
};

// Wd as kernels.h describes it: one of `neuron` and `hidden` is 1.
template <class T>
struct DownWeights {
  const T* first;
  int64_t neuron, hidden;
  int64_t gap;  // numbers between an expert and the next
  DownWeights() = default;
  explicit DownWeights(const ExpertMlpParams& p)
      : first(static_cast<const T*>(p.down_proj_t)),
        neuron(p.down.neuron),
        hidden(p.down.hidden),
        gap(p.down.expert != 0 ? p.down.expert - p.intermediate_size / p.num_experts * p.down.neuron
                               : 0) {}
  __device__ __forceinline__ int64_t place(int expert, int64_t row) const {
    return expert * gap + row * neuron;
  }
};

template <class Format>
struct DecodeArgs {
  using T = typename Format::Number;
  int num_tokens;
  int num_experts;
  int64_t hidden_size;
  int64_t x_stride;
  const T* x;                         // [T,H]
  const float* gates;                 // [T,E]
  typename Format::Matrix gate_proj;  // [I,H]
  typename Format::Matrix up_proj;    // [I,H]
  typename Format::Down down;         // [I,H] or [H,I]
  Logistic logistic;                  // the activation
  const int32_t* expert_offsets;      // [E+1]
  T* y;                               // [T,H]
  int max_units;                      // even
  int parts;                          // CTAs per strip of columns
  int* num_units;                     // [1]
  Unit* units;                        // [max_units]
  T* activations;     // [max_units / 2, 16, 16]  the left fragments' rows, two units each
  unsigned* arrived;  // [strips]
  float4* sums;       // [parts, strips, 256]
};

// 16 bytes of a row, zeros where there is no row or it has ended.
template <class T>
__device__ __forceinline__ uint4 row_chunk(const T* row, int64_t column, int64_t end) {
  return row != nullptr && column < end ? __ldg(reinterpret_cast<const uint4*>(row + column))
                                        : uint4{};
}

// Weights as they are. A format says of gate_proj and up_proj how many terms of a row 16 bytes hold (kTerms),
// how many such loads a lane has in flight (kAhead), and makes operands of mma of them, eight terms at a time
// (Chunk).
template <class T>
struct Numbers {
  using Number = T;
  using Matrix = WeightRows<const T>;
  using Down = DownWeights<T>;
  static constexpr int kTerms = 8;
  static constexpr int kAhead = 4;          // 19 warps per SM hide DRAM
  static constexpr int kUnitsTogether = 1;  // an expert has a multiple of so many units
  static constexpr bool kGroups = false, kScalesSums = false;

  struct Chunk {
    uint4 numbers;
    __device__ __forceinline__ void load(const Matrix&, const T* row, int64_t column, int64_t end) {
      numbers = row_chunk(row, column, end);
    }
    __device__ __forceinline__ uint4 terms(int) const { return numbers; }
  };
};

// d += 16 x 32 times 32 x 8, the operands as loaded: lane (g, q) holds terms 8q .. 8q+7 of its rows.
template <class T>
__device__ __forceinline__ void mma_loaded(float (&d)[4], const uint4& low, const uint4& high,
                                           const uint4& b) {
  const uint32_t first[4] = {low.x, high.x, low.y, high.y},
                 second[4] = {low.z, high.z, low.w, high.w};
  mma(d, first, b.x, b.y, T());
  mma(d, second, b.z, b.w, T());
}

// Registers of two rows, two columns each, -> one register of both rows per column.
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x5410);
}
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

// The left fragment of two units.
template <class T>
__device__ __forceinline__ void load_activations(uint32_t (&a)[4], const T* activations, int step) {
  const int g = threadIdx.x % kWarp / 4, q = threadIdx.x % 4;
  const uint32_t* rows =
      reinterpret_cast<const uint32_t*>(activations + step * kDecodeTokens * 2 * kUnit);
  a[0] = rows[g * 8 + q];
  a[1] = rows[(g + 8) * 8 + q];
  a[2] = rows[g * 8 + 4 + q];
  a[3] = rows[(g + 8) * 8 + 4 + q];
}

// Lane (g, q) has rows 2q and 2q + 1 of both units, eight columns from 8 g.
template <class T>
struct StepOfRows {
  static constexpr int kUnits = 2, kAtOnce = 2;
  Unit units[kUnits];  // looked up a round before their rows; none beyond the last step
  uint4 row[4];

  __device__ __forceinline__ void look_up(const DecodeArgs<Numbers<T>>& args, int step, int end,
                                          int) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) units[i] = step < end ? args.units[2 * step + i] : Unit{};
  }

  __device__ __forceinline__ void load(const DecodeArgs<Numbers<T>>& args, int64_t column) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Unit unit = units[i / 2];
      const int neuron = threadIdx.x % 4 * 2 + i % 2;
      const T* from =
          neuron < unit.rows ? args.down.first + unit.place + neuron * args.down.neuron : nullptr;
      row[i] = row_chunk(from, column, args.hidden_size);
    }
  }

  __device__ __forceinline__ void add(float (&sums)[8][4], const DecodeArgs<Numbers<T>>& args,
                                      int step) const {
    uint32_t a[4];
    load_activations(a, args.activations, step);
    const uint32_t* r[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = reinterpret_cast<const uint32_t*>(&row[i]);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      mma(sums[j], a, low_halves(r[0][j / 2], r[1][j / 2]), low_halves(r[2][j / 2], r[3][j / 2]),
          T());
      mma(sums[j + 1], a, high_halves(r[0][j / 2], r[1][j / 2]),
          high_halves(r[2][j / 2], r[3][j / 2]), T());
    }
  }
};

// Lane (g, q) has the neurons of unit q, of columns 8 g + j.
template <class T>
struct StepOfColumns {
  static constexpr int kUnits = 4, kAtOnce = 1;
  Unit unit;
  uint4 neurons[8];

  __device__ __forceinline__ static int mine(int step) { return kUnits * step + threadIdx.x % 4; }

  __device__ __forceinline__ void look_up(const DecodeArgs<Numbers<T>>& args, int step, int end,
                                          int num_units) {
    unit = step < end && mine(step) < num_units ? args.units[mine(step)] : Unit{};
  }

  __device__ __forceinline__ void load(const DecodeArgs<Numbers<T>>& args, int64_t column) {
    const int64_t stride = args.down.hidden;
    const int rows = column < args.hidden_size ? unit.rows : 0;
    const T* from = args.down.first + unit.place + column * stride;
    const bool in_chunks =
        reinterpret_cast<uintptr_t>(from) % 16 == 0 && stride % kUnit == 0 && rows == kUnit;
    if (in_chunks) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        neurons[j] = __ldg(reinterpret_cast<const uint4*>(from + j * stride));
      }
    } else {  // the end of an expert, or sizes that are no multiple of 8
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        alignas(16) T each[kUnit];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) each[i] = i < rows ? from[j * stride + i] : T(0.f);
        neurons[j] = reinterpret_cast<const uint4&>(each);
      }
    }
  }

  __device__ __forceinline__ void add(float (&sums)[8][4], const DecodeArgs<Numbers<T>>& args,
                                      int step) const {
    const int g = threadIdx.x % kWarp / 4, mine_now = mine(step);
    const T* rows = args.activations + mine_now / 2 * kDecodeTokens * 2 * kUnit;
    const int at = mine_now % 2 * kUnit;
    // what lies behind the last unit was never written
    const bool exists = mine_now < *args.num_units;
    const uint4 low = row_chunk(exists ? rows + g * 2 * kUnit : nullptr, at, 2 * kUnit);
    const uint4 high = row_chunk(exists ? rows + (g + 8) * 2 * kUnit : nullptr, at, 2 * kUnit);
#pragma unroll
    for (int j = 0; j < 8; ++j) mma_loaded<T>(sums[j], low, high, neurons[j]);
  }
};

}  // namespace dsmoe::cuda

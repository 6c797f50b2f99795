// Packing matrices into the panels of B that gemm_tile.h streams, zero-padded:
//   B[panel][K / kPair][kColumns][kPair]
//
//   pack_rows      columns of B are rows of the matrix   gate_proj, up_proj for x W;
//                                                        down_proj_t for dy V^T, down_proj for a V
//   pack_columns   columns of B are its columns          down_proj_t for a V; x, dy for dW;
//                                                        gate_proj, up_proj for dx;
//                                                        down_proj for dy V^T
//
// transpose_rows is for a gradient that is wanted the other way round than tiles make it.
//
// In the dwords of fp32, or of two neighbouring bf16, pack_rows is a plain transposition, done in
// registers; in pack_columns bf16 rows are interleaved two by two. Packed once for inference, or
// panel by panel just before use.
#pragma once

#include "simd.h"

namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kBlock = 16;
// dst[j * stride + i] = rows[i][j] for a block of 16 x 16 dwords.
DSMOE_INLINE void transpose_block(const uint32_t* const* rows, int64_t j0, uint32_t* dst,
                                  int64_t stride) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + j0);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(dst + i * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(dst + (i + 4) * stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_si512(dst + (i + 8) * stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    _mm512_storeu_si512(dst + (i + 12) * stride, _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd));
  }
}
#elif defined(__AVX2__) && !defined(DSMOE_EMULATE_AMX)
constexpr int kBlock = 8;
DSMOE_INLINE void transpose_block(const uint32_t* const* rows, int64_t j0, uint32_t* dst,
                                  int64_t stride) {
  __m256i r[8], t[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_si256((const __m256i*)(rows[i] + j0));
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_si256((__m256i*)(dst + i * stride),
                        _mm256_permute2x128_si256(r[i], r[i + 4], 0x20));
    _mm256_storeu_si256((__m256i*)(dst + (i + 4) * stride),
                        _mm256_permute2x128_si256(r[i], r[i + 4], 0x31));
  }
}
#else
constexpr int kBlock = kVecBytes / 4;
DSMOE_INLINE void transpose_block(const uint32_t* const* rows, int64_t j0, uint32_t* dst,
                                  int64_t stride) {
  for (int i = 0; i < kBlock; ++i)
    for (int j = 0; j < kBlock; ++j) memcpy(dst + j * stride + i, rows[i] + j0 + j, 4);
}
#endif

// One register's width of columns: lane i of step s holds rows[i][s * kPair ..]. Lanes from count
// on are zero. dst moves W registers per step, so that two calls fill a panel (W = 2).
template <class T, int W = 2>
static void pack_rows_half(const T* rows, int64_t stride, int count, int64_t k, T* dst) {
  constexpr int kPair = Compute<T>::kPair, kL = kLanes<T>, kStep = W * kL * kPair;
  int64_t s = 0;
  if constexpr (sizeof(T) * kPair == 4) {
    static_assert(kL == kBlock);
    VecU32 exists;
    const uint32_t* pointers[kBlock];
    for (int i = 0; i < kBlock; ++i) {
      exists[i] = i < count ? ~0u : 0;
      pointers[i] = (const uint32_t*)(rows + (i < count ? i : 0) * stride);
    }
    for (; count > 0 && (s + kBlock) * kPair <= k; s += kBlock) {
      uint32_t* out = (uint32_t*)(dst + s * kStep);
      transpose_block(pointers, s, out, W * kL);
      for (int j = 0; count < kL && j < kBlock; ++j) {
        const VecU32 lanes = load_raw<VecU32>(out + j * W * kL) & exists;
        memcpy(out + j * W * kL, &lanes, sizeof lanes);
      }
    }
    for (; count == 0 && s * kPair < k; ++s) memset(dst + s * kStep, 0, kVecBytes);
  }
  for (; s * kPair < k; ++s)
    for (int i = 0; i < kL; ++i)
      for (int j = 0; j < kPair; ++j) {
        const int64_t column = s * kPair + j;
        dst[s * kStep + i * kPair + j] = i < count && column < k ? rows[i * stride + column] : T{};
      }
}

// A panel whose first register are count0 rows at rows0, and whose second are count1 rows at rows1,
// K = k elements each.
template <class T>
static void pack_rows(const T* rows0, int64_t count0, const T* rows1, int64_t count1,
                      int64_t stride, int64_t k, T* dst) {
  constexpr int64_t kL = kLanes<T>;
  pack_rows_half(rows0, stride, int(max_of<int64_t>(0, min_of(count0, kL))), k, dst);
  pack_rows_half(rows1, stride, int(max_of<int64_t>(0, min_of(count1, kL))), k,
                 dst + kL * Compute<T>::kPair);
}

// The same for steps step_begin (a multiple of kBlock) to step_end of `panels` panels of columns column0.. of B,
// of which those below width exist: rows of a matrix, `stride` apart, of k elements.
template <class T>
static void pack_rows_of_panels(const T* rows, int64_t stride, int64_t k, int64_t step_begin,
                                int64_t step_end, int64_t column0, int64_t width, int64_t panels,
                                T* dst) {
  constexpr int64_t kPair = Compute<T>::kPair, kL = kLanes<T>, kN = kColumns<T>;
  const int64_t first = step_begin * kPair, count = min_of(step_end * kPair, k) - first;
  if (count <= 0) return;
  dst += step_begin * kN * kPair;
  for (int64_t column = column0; panels > 0;
       --panels, column += kN, dst += ceil_div(k, kPair) * kN * kPair) {
    const T* from = rows + column * stride + first;
    pack_rows(from, width - column, from + kL * stride, width - column - kL, stride, count, dst);
  }
}

// out[c * out_stride + r] = rows[r * stride + c], r < count, c < width.
template <class T>
static void transpose_rows(const T* rows, int64_t stride, int64_t count, int64_t width, T* out,
                           int64_t out_stride) {
  constexpr int64_t kPair = sizeof(T) == 2 ? 2 : 1, kRows = kBlock * kPair;  // of a block of dwords
  int64_t r = 0;
  if constexpr (sizeof(T) <= 4) {
    for (; r + kRows <= count; r += kRows) {
      int64_t c = 0;
      for (; c + kBlock <= width; c += kBlock) {
        alignas(64) uint32_t pairs[kBlock][kBlock], turned[kBlock][kBlock];
        const uint32_t* from[kBlock];
        for (int i = 0; i < kBlock; ++i) {
          const T* row = rows + (r + i * kPair) * stride + c;
          if constexpr (kPair == 2) {
            const VecU32 both = widen_u16(row) | widen_u16(row + stride) << 16;
            memcpy(pairs[i], &both, sizeof both);
            from[i] = pairs[i];
          } else {
            from[i] = (const uint32_t*)row;
          }
        }
        transpose_block(from, 0, turned[0], kBlock);
        for (int i = 0; i < kBlock; ++i)
          memcpy(out + (c + i) * out_stride + r, turned[i], sizeof turned[i]);
      }
      for (; c < width; ++c)
        for (int i = 0; i < kRows; ++i) out[c * out_stride + r + i] = rows[(r + i) * stride + c];
    }
  }
  for (int64_t c = 0; r < count && c < width; ++c)
    for (int64_t i = r; i < count; ++i) out[c * out_stride + i] = rows[i * stride + c];
}

// Steps step_begin to step_end of panels panels, W registers wide, of columns column0.. of a matrix with k rows;
// row(i) points at row i. Only columns below width exist.
template <int W = 2, class T, class Row>
DSMOE_INLINE void pack_columns(Row row, int64_t k, int64_t step_begin, int64_t step_end,
                               int64_t column0, int64_t width, int64_t panels, T* dst) {
  constexpr int kPair = Compute<T>::kPair, kL = kLanes<T>;
  constexpr int64_t kN = W * kL;
  const int64_t steps = ceil_div(k, kPair);
  for (int64_t s = step_begin; s < step_end; ++s) {  // rows outside: they are read in long runs
    const T* first = row(s * kPair);
    const T* second = s * kPair + 1 < k ? row(s * kPair + 1) : first;
    const bool is_single = s * kPair + 1 >= k;
    for (int64_t p = 0; p < panels; ++p) {
      T* out = dst + (p * steps + s) * kN * kPair;
      const int64_t column = column0 + p * kN;
      if (column + kN <= width) {
        for (int v = 0; v < W; ++v) {
          if constexpr (kPair == 2) {
            VecU32 pair = widen_u16(first + column + v * kL);
            if (!is_single) pair |= widen_u16(second + column + v * kL) << 16;
            memcpy(out + v * kL * 2, &pair, sizeof pair);
          } else {
            memcpy(out + v * kL, first + column + v * kL, sizeof(T) * kL);
          }
        }
        continue;
      }
      for (int64_t i = 0; i < kN; ++i) {
        const bool exists = column + i < width;
        out[i * kPair] = exists ? first[column + i] : T{};
        if (kPair == 2) out[i * kPair + 1] = exists && !is_single ? second[column + i] : T{};
      }
    }
  }
}

}  // namespace dsmoe::cpu::DSMOE_ISA_NAMESPACE

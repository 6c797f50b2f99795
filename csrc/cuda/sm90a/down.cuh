// down on sm_90a: y[chunk of 512 tokens, 192 columns] = sum over e of a[tokens of e] Wd_e          see sm90a/forward.cu
//                 dx the same with dg Wg_e + du Wu_e: two sources, one sum                        see sm90a/backward.cu
//
//   rows     tokens that are active for the expert, gathered   [256, S_e]
//   columns  of Wd_e, the sum running down its rows            [S_e, 192], in panels of 64
//   result   added to a strip that only this CTA touches       [512, 192] fp32
//
// Twice the tokens of gemm_down.cuh, because products come in blocks of 64 rows: of 512 tokens, 3/8 are
// 192. Strips of fewer columns or tokens where those would leave SMs idle; no bit of y changes. 64 rows
// of Wd that lie together come by the copy engine; those at an expert's end, or of small experts with
// gaps between their columns, come one by one, with zeros in the gaps.
#pragma once

#include "cuda/gemm_down.cuh"    // DownUnit, token_of_row
#include "cuda/sm90a/forward.h"  // kStripFloats
#include "cuda/sm90a/pipeline.cuh"

namespace dsmoe::cuda::sm90a {

constexpr int kPanelColumns = 64;
constexpr int kPanelBytes = kTerms * kLine;  // 64 terms of 64 columns

// Of the sources' weights.
struct SourceMaps {
  CUtensorMap of[2];
};

// Rows of Wd behind the 64 columns of a step: -1 in gaps and beyond the span.
struct StepRows {
  int first, last, mine;  // mine: at this thread's chunk of the gathered rows
  __device__ bool lie_together() const { return first >= 0 && last - first == kTerms - 1; }
};

// All steps of 256 rows of a span: those of one source after those of the other.
template <int kColumns, class T>
__device__ __forceinline__ void fetch_rows(Producer& producer, const PassArgs<T>& args,
                                           const SourceMaps& weights, const DownUnit& unit,
                                           const SpanIterator::Span& span, int first_row) {
  constexpr int kPanels = kColumns / kPanelColumns;
  const int t = threadIdx.x % kGroup, chunk = t % kChunks;
  const int rows = blocks_of(min(span.pairs.count() - first_row, kMaxRows)) * kBlockRows;
  constexpr uint32_t kNone = UINT32_MAX;
  uint32_t from[kRowCopies];  // in chunks: there are no registers for as many addresses
#pragma unroll
  for (int i = 0; i < kRowCopies; ++i) {
    const int token = token_of_row(args, unit, span, first_row + t / kChunks + i * kRowsAtOnce);
    from[i] = token < 0 ? kNone : token * static_cast<uint32_t>(args.width / kChunk);
  }
  auto row_at = [&](int column) {
    return column < span.end_column ? args.row_of_column[column] : -1;
  };
  auto look_up = [&](int column) {
    return StepRows{row_at(column), row_at(column + kTerms - 1), row_at(column + chunk * kChunk)};
  };
#pragma unroll 1
  for (int s = 0; s < args.num_sources; ++s) {
    const SumSource<T>& source = args.sources[s];
    StepRows ahead = look_up(span.first_column);
#pragma unroll 1
    for (int column = span.first_column; column < span.end_column; column += kTerms) {
      const StepRows now = ahead;
      ahead = look_up(column + kTerms);  // a step ahead: the copies need the answer at once
      const bool together = now.lie_together();
      if (producer.begin(together ? kPanels * kPanelBytes : 0)) {
        for (int panel = 0; panel < kPanels; ++panel) {
          copy_box(producer.stage() + kRowsBytes + panel * kPanelBytes, weights.of[s], now.first,
                   unit.first_column + panel * kPanelColumns, producer.full());
        }
      }
      const T* base = source.rows + unit.chunk * kTokensPerChunk * args.width + column;
      copy_rows(producer.stage(), rows, now.mine >= 0, source.rows, [&](int i) {
        return from[i] == kNone ? nullptr : base + uint64_t{from[i]} * kChunk;
      });
      if (!together) {
#pragma unroll 1
        for (int term = t / kChunks; term < kTerms; term += kRowsAtOnce) {
          const int64_t row = row_at(column + term);
          const uint32_t to =
              producer.stage() + kRowsBytes + term * kLine + (chunk ^ term % 8) * 16;
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
            const int y_column = unit.first_column + panel * kPanelColumns + chunk * kChunk;
            const bool exists = row >= 0 && y_column < args.hidden_size;
            cp_async_16(to + panel * kPanelBytes,
                        source.weights + (exists ? row * args.hidden_size + y_column : 0), exists);
          }
        }
      }
      producer.end();
    }
  }
}

// Where a unit's sums stand: a token's columns, then `stride` floats on the next one's. Both ends of a
// unit go over them alike, a thread over four columns of each panel, of every 16th token.
template <int kColumns>
struct StripSums {
  static constexpr int kPanels = kColumns / kPanelColumns;
  static constexpr int kQuads = kPanelColumns / 4, kTokensAtOnce = kConsumers / kQuads;
  static constexpr int kAhead = 4;  // tokens whose sums are read before they are written
  float* sums;
  int64_t stride;
  int tokens, columns;  // columns: as far as y goes

  __device__ int first_token() const { return threadIdx.x / kQuads; }
  __device__ int column(int panel) const {
    return panel * kPanelColumns + threadIdx.x % kQuads * 4;
  }
  __device__ float4& at(int token, int panel) const {
    return *reinterpret_cast<float4*>(sums + token * stride + column(panel));
  }
  __device__ void clear() const {
#pragma unroll 1
    for (int token = first_token(); token < tokens; token += kTokensAtOnce) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        if (panel * kPanelColumns < columns) at(token, panel) = float4{};
      }
    }
  }
  template <class T>
  __device__ void write(T* y, int64_t y_stride) const {
#pragma unroll 1
    for (int first = first_token(); first < tokens; first += kAhead * kTokensAtOnce) {
      float4 ahead[kAhead][kPanels];
      auto exists = [&](int i, int panel) {
        return first + i * kTokensAtOnce < tokens && column(panel) < columns;
      };
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          ahead[i][panel] = exists(i, panel) ? at(first + i * kTokensAtOnce, panel) : float4{};
        }
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        T* row = y + (first + i * kTokensAtOnce) * y_stride;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          const float4 sum = ahead[i][panel];
          if (exists(i, panel)) {
            __stcg(reinterpret_cast<uint2*>(row + column(panel)),
                   uint2{pack(sum.x, sum.y, T()), pack(sum.z, sum.w, T())});
          }
        }
      }
    }
  }
};

// Between what one expert and what the next adds to a strip; the fetching warps take no part.
__device__ __forceinline__ void consumers_meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
}

// token_at(row of the tile) -> token of the strip, or -1.
template <class T, int kColumns, int kLive, class Token>
__device__ __forceinline__ void add_products(Ring& ring, int num_steps,
                                             const StripSums<kColumns>& strip, Token token_at) {
  float sums[kLive][kColumns / 2]{};
  multiply<T, 0, 1>(ring, num_steps, sums);
  consumers_meet();
#pragma unroll
  for (int block = 0; block < kLive; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = token_at(row_of_sums(block, half));
      if (token < 0) continue;
      float* out = strip.sums + token * strip.stride + threadIdx.x % 4 * 2;
#pragma unroll
      for (int panel = 0; panel < kColumns / kPanelColumns; ++panel) {
        if (panel * kPanelColumns >= strip.columns) break;
#pragma unroll
        for (int j = panel * 8; j < panel * 8 + 8; ++j) {
          float2* sum = reinterpret_cast<float2*>(out + j * 8);
          const float2 before = *sum;
          *sum = float2{before.x + sums[block][j * 4 + half * 2],
                        before.y + sums[block][j * 4 + half * 2 + 1]};
        }
      }
    }
  }
}

// This CTA's units; of each, tile(unit, span, first row) for every 256 rows of every span.
template <int kColumns, class T, class Begin, class Tile, class End>
__device__ __forceinline__ void for_each_unit(const PassArgs<T>& args, int chunks, Begin begin,
                                              Tile tile, End end) {
  DownUnits<kColumns> units(args, chunks);
  DownUnit unit;
  while (units.next(unit)) {
    begin(unit);
    SpanIterator spans(args.lists, args.expert_offsets, args.expert_columns, args.num_experts,
                       unit.chunk, chunks);
    SpanIterator::Span span;
    while (spans.next(span, unit.tokens)) {
      for (int row = 0; row < span.pairs.count(); row += kMaxRows) tile(unit, span, row);
    }
    end(unit);
  }
}

// chunks: of tokens, in a unit. sums_of_all: a unit's strip is a part of one matrix [tokens, H up to whole
// panels], which outlives the launch; else a CTA has room for the strip that it is at.
template <class T, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    down_kernel(const __grid_constant__ PassArgs<T> args,
                const __grid_constant__ SourceMaps weights, int chunks, bool sums_of_all) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  make_mbarriers(base);
  auto nothing = [](const DownUnit&) {};
  if (threadIdx.x >= kConsumers) {
    Registers<56, 224>::fetch();
    Producer producer(base);
    for_each_unit<kColumns>(
        args, chunks, nothing,
        [&](const DownUnit& unit, const SpanIterator::Span& span, int row) {
          fetch_rows<kColumns>(producer, args, weights, unit, span, row);
        },
        nothing);
    producer.finish();
    return;
  }
  Registers<56, 224>::multiply();
  Ring ring(base);
  auto strip_of = [&](const DownUnit& unit) {
    const int left = static_cast<int>(args.hidden_size) - unit.first_column;
    StripSums<kColumns> strip{args.strips + blockIdx.x * int64_t{kStripFloats}, kColumns,
                              unit.tokens, left};
    if (sums_of_all) {
      strip.stride = ceil_div<int64_t>(args.hidden_size, kPanelColumns) * kPanelColumns;
      strip.sums = args.strips + unit.chunk * kTokensPerChunk * strip.stride + unit.first_column;
    }
    return strip;
  };
  // the same thread clears and reads: neither y nor the next unit's zeros need a barrier
  for_each_unit<kColumns>(
      args, chunks,
      [&](const DownUnit& unit) {
        if (args.turn.is_first) strip_of(unit).clear();
      },
      [&](const DownUnit& unit, const SpanIterator::Span& span, int row) {
        const int num_steps =
            args.num_sources * ceil_div(span.end_column - span.first_column, kTerms);
        const int rows = min(span.pairs.count() - row, kMaxRows);
        const int live = live_blocks(rows, threadIdx.x / kGroup);
        auto token_at = [&](int line) { return token_of_row(args, unit, span, row + line); };
        if (live == 2) {
          add_products<T, kColumns, 2>(ring, num_steps, strip_of(unit), token_at);
        } else if (live == 1) {
          add_products<T, kColumns, 1>(ring, num_steps, strip_of(unit), token_at);
        } else {
          pass_by(ring, num_steps);
          consumers_meet();
        }
      },
      [&](const DownUnit& unit) {
        consumers_meet();
        if (!args.turn.is_last) return;
        strip_of(unit).write(
            args.y + unit.chunk * kTokensPerChunk * args.hidden_size + unit.first_column,
            args.hidden_size);
      });
}

}  // namespace dsmoe::cuda::sm90a

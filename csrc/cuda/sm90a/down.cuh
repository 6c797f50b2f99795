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
  GatheredRows from;
#pragma unroll
  for (int i = 0; i < kRowCopies; ++i) {
    const int token = token_of_row(args, unit, span, first_row + t / kChunks + i * kRowsAtOnce);
    from.set(i, token >= 0, token, args.width);
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
      copy_rows(producer.stage(), rows, now.mine >= 0, base, from);
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
                        source.weights.first + row * source.weights.stride + y_column, exists);
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
  int part, parts;      // of the unit's strips, kStripFloats apart

  __device__ int first_token() const { return threadIdx.x / kQuads; }
  __device__ int column(int panel) const {
    return panel * kPanelColumns + threadIdx.x % kQuads * 4;
  }
  __device__ float4& at(int token, int panel) const {
    return *reinterpret_cast<float4*>(sums + token * stride + column(panel));
  }
  __device__ const float4& of_part(int index, int token, int panel) const {
    return *(&at(token, panel) + (index - part) * (kStripFloats / 4));
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
          ahead[i][panel] =
              exists(i, panel) ? of_part(0, first + i * kTokensAtOnce, panel) : float4{};
        }
      }
#pragma unroll 1
      for (int other = 1; other < parts; ++other) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
#pragma unroll
          for (int panel = 0; panel < kPanels; ++panel) {
            if (!exists(i, panel)) continue;
            add(ahead[i][panel], of_part(other, first + i * kTokensAtOnce, panel));
          }
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

struct AnyOfConsumers {
  __device__ __forceinline__ bool operator()(bool holds) const {
    unsigned any;
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %1, 0; bar.red.or.pred p, 1, %2, p; selp.u32 %0, 1, 0, p; }"
        : "=r"(any)
        : "r"(static_cast<unsigned>(holds)), "n"(kConsumers)
        : "memory");
    return any != 0;
  }
};

// token_at(row of the tile) -> token of the strip, or -1. Sums do not start from the strip's: ptxas would make each
// wgmma wait for the one before (C7515).
template <class T, int kColumns, int kLive, class Token>
__device__ __forceinline__ void add_products(Ring& ring, int num_steps,
                                             const StripSums<kColumns>& strip, Token token_at) {
  float sums[kLive][kColumns / 2]{};
  multiply<T, 0, 1>(ring, num_steps, sums);
  consumers_meet();  // the tile before, or the zeros, have been written
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
        float2 before[8];  // all read before any is written: one round trip
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          before[j] = __ldcg(reinterpret_cast<const float2*>(out + (panel * 8 + j) * 8));
        }
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float* two = &sums[block][(panel * 8 + j) * 4 + half * 2];
          __stcg(reinterpret_cast<float2*>(out + (panel * 8 + j) * 8),
                 float2{before[j].x + two[0], before[j].y + two[1]});
        }
      }
    }
  }
}

// Several CTAs share a sum of narrow strips only.
template <int kColumns, class T>
__device__ __forceinline__ int parts_of(const PassArgs<T>& args) {
  return kColumns == kPanelColumns ? args.parts : 1;
}

// This CTA's units; of each, tile(unit, span, first row) for every 256 rows of every span.
template <int kColumns, class T, class Begin, class Tile, class End>
__device__ __forceinline__ void for_each_unit(const PassArgs<T>& args, int chunks, Begin begin,
                                              Tile tile, End end) {
  DownUnits<kColumns, kColumns == kPanelColumns> units(args, chunks);
  DownUnit unit;
  while (units.next(unit)) {
    begin(unit);
    SpanIterator spans(args.lists, args.expert_offsets, args.expert_columns, args.num_experts,
                       {unit.part, parts_of<kColumns>(args), kTerms}, unit.chunk, chunks);
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
    const int parts = parts_of<kColumns>(args);
    const int64_t index = parts == 1 ? blockIdx.x : unit.index;
    StripSums<kColumns> strip{
        args.strips + index * kStripFloats, kColumns, unit.tokens, left, unit.part, parts};
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
        if (parts_of<kColumns>(args) > 1 && !is_last_part(args, unit, AnyOfConsumers())) return;
        strip_of(unit).write(
            args.y + unit.chunk * kTokensPerChunk * args.hidden_size + unit.first_column,
            args.hidden_size);
      });
}

}  // namespace dsmoe::cuda::sm90a

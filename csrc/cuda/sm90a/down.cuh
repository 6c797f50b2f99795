// down on sm_90a: y[chunk of 512 tokens, 128 columns] = sum over e of a[tokens of e] Wd_e          see sm90a/forward.cu
//                 dx the same with dg Wg_e + du Wu_e: two sources, one sum                        see sm90a/backward.cu
//
//   rows     tokens that are active for the expert, gathered   [256, S_e]
//   columns  of Wd_e, the sum running down its rows            [S_e, 128]
//   result   added to a strip that only this CTA touches       [512, 128] fp32
//
// Twice the tokens of gemm_down.cuh, because products come in blocks of 64 rows: of 512 tokens, 3/8 are
// 192. 64 rows of Wd that lie together come by the copy engine; those at an expert's end, or of small
// experts with gaps between their columns, come one by one, with zeros in the gaps.
#pragma once

#include "cuda/gemm_down.cuh"  // DownUnit, token_of_row
#include "cuda/sm90a/pipeline.cuh"

namespace dsmoe::cuda::sm90a {

constexpr int kMaxChunks = 2;  // of a unit
constexpr int kStripColumns = 128, kStripFloats = kMaxChunks * kTokensPerChunk * kStripColumns;
constexpr int kPanelBytes = kTerms * kLine;  // 64 terms of 64 columns; two panels
constexpr int kDownBytes = 2 * kPanelBytes;
static_assert(kDownBytes <= kWeightsBytes);
static_assert(kStripFloats == kCtasPerSm * DownTile::kStripFloats, "the workspace has as much");

// Of the sources' weights.
struct SourceMaps {
  CUtensorMap of[2];
};

// Rows of Wd behind the 64 columns of a step: -1 in gaps and beyond the span.
struct StepRows {
  int first, last, mine;  // mine: at this thread's chunk of the gathered rows
  __device__ bool lie_together() const { return first >= 0 && last - first == kTerms - 1; }
};

template <class T>
__device__ __forceinline__ void fetch_rows(Producer& producer, const PassArgs<T>& args,
                                           const SumSource<T>& source, const CUtensorMap& weights,
                                           const DownUnit& unit, const SpanIterator::Span& span,
                                           int first_row) {
  const int t = threadIdx.x % kGroup, chunk = t % kChunks;
  const T* base = source.rows + unit.chunk * kTokensPerChunk * args.width;
  const int rows = blocks_of(min(span.pairs.count() - first_row, kMaxRows)) * kBlockRows;
  int token[kRowCopies];
#pragma unroll
  for (int i = 0; i < kRowCopies; ++i) {
    token[i] = token_of_row(args, unit, span, first_row + t / kChunks + i * kRowsAtOnce);
  }
  auto row_at = [&](int column) {
    return column < span.end_column ? args.row_of_column[column] : -1;
  };
  auto look_up = [&](int column) {
    return StepRows{row_at(column), row_at(column + kTerms - 1), row_at(column + chunk * kChunk)};
  };
  StepRows ahead = look_up(span.first_column);
  for (int column = span.first_column; column < span.end_column; column += kTerms) {
    const StepRows now = ahead;
    ahead = look_up(column + kTerms);  // a step ahead: the copies need the answer at once
    const bool together = now.lie_together();
    if (producer.begin(together ? kDownBytes : 0)) {
      for (int panel = 0; panel < 2; ++panel) {
        copy_box(producer.stage() + kRowsBytes + panel * kPanelBytes, weights, now.first,
                 unit.first_column + panel * 64, producer.full());
      }
    }
    copy_rows(producer.stage(), rows, now.mine >= 0, source.rows, [&](int i) {
      return token[i] < 0 ? nullptr : base + token[i] * args.width + column;
    });
    if (!together) {
      constexpr int kAcross = kStripColumns / kChunk, kTermsAtOnce = kGroup / kAcross;
      const int c = t % kAcross, y_column = unit.first_column + c * kChunk;
      const uint32_t to = producer.stage() + kRowsBytes + c / kChunks * kPanelBytes;
      for (int term = t / kAcross; term < kTerms; term += kTermsAtOnce) {
        const int64_t row = row_at(column + term);
        const bool exists = row >= 0 && y_column < args.hidden_size;
        cp_async_16(to + term * kLine + (c % kChunks ^ term % 8) * 16,
                    source.weights + (exists ? row * args.hidden_size + y_column : 0), exists);
      }
    }
    producer.end();
  }
}

// Between what one expert and what the next adds to a strip; the fetching warps take no part.
__device__ __forceinline__ void consumers_meet() {
  asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
}

template <class T, int kLive>
__device__ __forceinline__ void add_products(const PassArgs<T>& args, const DownUnit& unit,
                                             const SpanIterator::Span& span, int first_row,
                                             Ring& ring, int num_steps, float* strip) {
  const int lane = threadIdx.x % kWarp;
  float sums[kLive][kStripColumns / 2]{};
  multiply<T, 0, 1>(ring, num_steps, sums);
  consumers_meet();
#pragma unroll
  for (int block = 0; block < kLive; ++block) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = token_of_row(args, unit, span, first_row + row_of_sums(block, half));
      if (token < 0) continue;
      float* out = strip + token * kStripColumns + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < kStripColumns / 8; ++j) {
        float2* sum = reinterpret_cast<float2*>(out + j * 8);
        const float2 before = *sum;
        *sum = float2{before.x + sums[block][j * 4 + half * 2],
                      before.y + sums[block][j * 4 + half * 2 + 1]};
      }
    }
  }
}

// This CTA's units; of each, tile(unit, span, first row) for every 256 rows of every span.
template <class T, class Begin, class Tile, class End>
__device__ __forceinline__ void for_each_unit(const PassArgs<T>& args, Begin begin, Tile tile,
                                              End end) {
  // few units would leave SMs idle: then small ones
  const int64_t large = ceil_div<int64_t>(args.lists.tables.num_chunks, kMaxChunks) *
                        ceil_div<int64_t>(args.hidden_size, kStripColumns);
  const int chunks = large >= gridDim.x ? kMaxChunks : 1;
  DownUnits<kStripColumns> units(args, chunks);
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

// Where a unit's strip begins if each has its own: no more room than for single chunks.
template <class T>
__device__ __forceinline__ int64_t first_of_unit(const PassArgs<T>& args, const DownUnit& unit) {
  const int64_t strips = ceil_div<int64_t>(args.hidden_size, kStripColumns);
  const int64_t chunks = ceil_div(unit.tokens, kTokensPerChunk);
  const int64_t before = unit.chunk * strips + unit.first_column / kStripColumns * chunks;
  return before * kTokensPerChunk * kStripColumns;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    down_kernel(const __grid_constant__ PassArgs<T> args,
                const __grid_constant__ SourceMaps weights, bool strip_per_unit) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  make_mbarriers(base);
  auto nothing = [](const DownUnit&) {};
  if (threadIdx.x >= kConsumers) {
    Registers<88, 208>::fetch();
    Producer producer(base);
    for_each_unit(
        args, nothing,
        [&](const DownUnit& unit, const SpanIterator::Span& span, int row) {
          for (int s = 0; s < args.num_sources; ++s) {
            fetch_rows(producer, args, args.sources[s], weights.of[s], unit, span, row);
          }
        },
        nothing);
    producer.finish();
    return;
  }
  Registers<88, 208>::multiply();
  Ring ring(base);
  float* strip = nullptr;
  constexpr int kQuads = kStripColumns / 4;
  for_each_unit(
      args,
      [&](const DownUnit& unit) {
        strip = args.strips +
                (strip_per_unit ? first_of_unit(args, unit) : blockIdx.x * int64_t{kStripFloats});
        float4* quads = reinterpret_cast<float4*>(strip);
        for (int i = threadIdx.x; i < unit.tokens * kQuads && args.turn.is_first; i += kConsumers) {
          quads[i] = float4{};
        }
      },
      [&](const DownUnit& unit, const SpanIterator::Span& span, int row) {
        const int num_steps =
            args.num_sources * ceil_div(span.end_column - span.first_column, kTerms);
        const int rows = min(span.pairs.count() - row, kMaxRows);
        const int live = live_blocks(rows, threadIdx.x / kGroup);
        if (live == 2) {
          add_products<T, 2>(args, unit, span, row, ring, num_steps, strip);
        } else if (live == 1) {
          add_products<T, 1>(args, unit, span, row, ring, num_steps, strip);
        } else {
          pass_by(ring, num_steps);
          consumers_meet();
        }
      },
      [&](const DownUnit& unit) {
        consumers_meet();
        const float4* quads = reinterpret_cast<const float4*>(strip);
        // the same thread as at the beginning: neither y nor the next unit's zeros need a barrier
        for (int i = threadIdx.x; i < unit.tokens * kQuads && args.turn.is_last; i += kConsumers) {
          const int column = unit.first_column + i % kQuads * 4;
          if (column >= args.hidden_size) continue;
          const int64_t token = unit.chunk * kTokensPerChunk + i / kQuads;
          const float4 sum = quads[i];
          __stcg(reinterpret_cast<uint2*>(args.y + token * args.hidden_size + column),
                 uint2{pack(sum.x, sum.y, T()), pack(sum.z, sum.w, T())});
        }
      });
}

}  // namespace dsmoe::cuda::sm90a

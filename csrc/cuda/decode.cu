// expert_mlp for T <= 16 tokens: y_t = sum_e G[t,e] * (act(x_t Wg_e) * (x_t Wu_e)) Wd_e     bf16, fp16
//
// Reading the weights is the work: 6 S_e H bytes per active expert, once whatever T is. Everything
// else must stay out of its way. So nothing goes through shared memory on its way in: a lane loads 16
// bytes of weights, and those registers are already a fragment of mma.m16n8k16, whose 16 rows are the
// tokens in `outputs`; in `neurons` they are 8 neurons of both matrices, and 8 tokens the columns. That
// works because a sum has no order that mma cares about: any 16 terms may be "k 0-15", as long as both
// operands agree, and any 8 columns may be "n 0-7".
//
//   neurons   a[t, unit] for units of 8 neurons of one active expert         sum over H
//             lane (g, q): 8 numbers of rows g of Wg and Wu, of x_g and x_{g+8}, at 8 q: two mma for either x
//             a CTA per unit, the sum cut into four for its warps
//   outputs   y[t, 64 columns]                                               sum over units
//             lane (g, q): 8 numbers of rows 2q, 2q+1 of two units at 8 g. Byte permutes pair the rows
//             up; block j takes columns j, 8 + j, .. 56 + j: eight mma
//             a CTA per 64 columns and part of the units, the part cut into eight for its warps
//             Where Wd is [H,I], lane (g, q) has 8 neurons of unit q of four, of columns 8 g + j: two mma a column
//
// A format says how a lane gets its numbers: they are the weights (Numbers, decode_steps.cuh), or made
// of codes of 8 or 4 bits (Codes, decode_codes.cuh), of which 16 bytes are two or four times as many.
//
// Sums of warps, then of parts, are added in a fixed order; the CTA that arrives last at a strip of
// columns adds the parts. Units exist on the device only: every CTA of `neurons` counts the active
// experts by itself, 128 columns of gates a round; for few rounds that is quicker than one more launch.
#include "cuda/decode.cuh"
#include "cuda/decode_codes.cuh"
#include "cuda/decode_steps.cuh"
#include "cuda/last_to_arrive.cuh"
#include "cuda/launch.cuh"
#include "cuda/permute.cuh"

namespace dsmoe::cuda {
namespace {

constexpr int kNeuronThreads = 128, kNeuronWarps = kNeuronThreads / kWarp;
constexpr int kOutputThreads = 256, kOutputWarps = kOutputThreads / kWarp;

// -------------------------------------------------------------------------------------- neurons

// counts[0 .. n] become the sums of those before. All threads; ends with a barrier. A thread adds up neighbouring ones.
__device__ void exclusive_sum(int* counts, int n) {
  __shared__ int warp_totals[kNeuronWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int run = ceil_div(n, kNeuronThreads);
  const int begin = min(static_cast<int>(threadIdx.x) * run, n);
  const int end = min(begin + run, n);
  int mine = 0;
  for (int i = begin; i < end; ++i) mine += counts[i];
  const int through = warp_inclusive_sum(mine);
  if (lane == kWarp - 1) warp_totals[warp] = through;
  __syncthreads();
  int start = through - mine;
  for (int w = 0; w < warp; ++w) start += warp_totals[w];
  for (int i = begin; i < end; ++i) {
    const int own = counts[i];
    counts[i] = start;
    start += own;
  }
  if (threadIdx.x == kNeuronThreads - 1) counts[n] = start;
  __syncthreads();
}

// first_unit[e] = units of active experts before e; first_group[e] = groups of all experts before it. All threads; ends
// with a barrier. First a thread asks for everything that it needs of its experts, no round waiting for another.
template <class Format>
__device__ void count_units(const DecodeArgs<Format>& args, int* first_unit, int* first_group) {
  const int num_experts = args.num_experts;
#pragma unroll 2
  for (int expert = threadIdx.x; expert < num_experts; expert += kNeuronThreads) {
    const int size = __ldg(args.expert_offsets + expert + 1) - __ldg(args.expert_offsets + expert);
    bool is_active = false;
#pragma unroll
    for (int t = 0; t < kDecodeTokens; ++t) {
      const float gate = t < args.num_tokens ? __ldg(args.gates + t * num_experts + expert) : 0.f;
      is_active |= gate != 0.f;
    }
    constexpr int kTogether = Format::kUnitsTogether;
    first_unit[expert] = is_active ? ceil_div(size, kTogether * kUnit) * kTogether : 0;
    if constexpr (Format::kGroups) first_group[expert] = args.down.groups_of(size);
  }
  __syncthreads();
  exclusive_sum(first_unit, num_experts);
  if constexpr (Format::kGroups) exclusive_sum(first_group, num_experts);
}

// The expert that owns a unit: the last one whose first unit is not beyond it.
__device__ int expert_of_unit(const int* first_unit, int num_experts, int unit) {
  int low = 0, high = num_experts;  // first_unit[low] <= unit < first_unit[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first_unit[middle] <= unit ? low : high) = middle;
  }
  return low;
}

template <class Format>
__global__ void __launch_bounds__(kNeuronThreads)
    neurons_kernel(const __grid_constant__ DecodeArgs<Format> args) {
  using T = typename Format::Number;
  extern __shared__ int first_unit[];                    // [E+1]
  int* first_group = first_unit + args.num_experts + 1;  // [E+1]
  __shared__ float sums[2][kNeuronWarps][4][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  count_units(args, first_unit, first_group);
  const int num_units = first_unit[args.num_experts];
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) *args.num_units = num_units;
    const int strips = static_cast<int>(ceil_div<int64_t>(args.hidden_size, kStripColumns));
    for (int i = threadIdx.x; i < strips; i += kNeuronThreads) args.arrived[i] = 0;
  }
  const T* low_row = g < args.num_tokens ? args.x + g * args.x_stride : nullptr;
  const T* high_row = g + 8 < args.num_tokens ? args.x + (g + 8) * args.x_stride : nullptr;

  // one more unit if their number is odd: its activations are zeros
  const int even_units = ceil_div(num_units, 2) * 2;
  for (int unit = blockIdx.x; unit < even_units; unit += gridDim.x) {
    const int expert = expert_of_unit(first_unit, args.num_experts, unit);
    const int first_row = args.expert_offsets[expert] + (unit - first_unit[expert]) * kUnit;
    const int rows = unit < num_units ? min(kUnit, args.expert_offsets[expert + 1] - first_row) : 0;
    using Row = decltype(args.gate_proj.at(expert, first_row));
    const Row gate_row = g < rows ? args.gate_proj.at(expert, first_row + g) : Row{};
    const Row up_row = g < rows ? args.up_proj.at(expert, first_row + g) : Row{};
    float low_sums[4] = {},
          high_sums[4] = {};  // gate's and up's neuron g of tokens 2q, 2q + 1 (+ 8)
    constexpr int kAhead = Format::kAhead, kTerms = Format::kTerms;
    constexpr int kStep = 4 * kTerms;  // terms of one warp's load
#pragma unroll 1
    for (int64_t k = warp * kStep + q * kTerms; k - q * kTerms < args.hidden_size;
         k += kAhead * kNeuronWarps * kStep) {
      typename Format::Chunk gates[kAhead], ups[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int64_t column = k + i * kNeuronWarps * kStep;
        gates[i].load(args.gate_proj, gate_row, column, args.hidden_size);
        ups[i].load(args.up_proj, up_row, column, args.hidden_size);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
#pragma unroll
        for (int part = 0; part < kTerms / 8; ++part) {
          const int64_t column = k + i * kNeuronWarps * kStep + part * 8;
          const uint4 low = row_chunk(low_row, column, args.hidden_size),
                      high = row_chunk(high_row, column, args.hidden_size);
          const uint4 of_gate = gates[i].terms(part), of_up = ups[i].terms(part);
          mma_loaded<T>(low_sums, of_gate, of_up, low);
          mma_loaded<T>(high_sums, of_gate, of_up, high);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      sums[0][warp][c][lane] = low_sums[c];
      sums[1][warp][c][lane] = high_sums[c];
    }
    __syncthreads();
    // thread i * 32 + lane finishes token 2q + i % 2 (+ 8 for i >= 2), neuron g
    const int token = 2 * q + warp % 2 + warp / 2 * 8, neuron = g;
    float total[2] = {};
    for (int w = 0; w < kNeuronWarps; ++w) {
      total[0] += sums[warp / 2][w][warp % 2][lane];
      total[1] += sums[warp / 2][w][2 + warp % 2][lane];
    }
    if constexpr (Format::kScalesSums) {
      total[0] *= neuron < rows ? args.gate_proj.channel_scale(first_row + neuron) : 0.f;
      total[1] *= neuron < rows ? args.up_proj.channel_scale(first_row + neuron) : 0.f;
    }
    const float weight = token < args.num_tokens && neuron < rows
                             ? args.gates[token * args.num_experts + expert]
                             : 0.f;
    // not a product with 0: what an inactive pair computed may be infinite
    const float result = weight != 0.f ? weight * (args.logistic.value(total[0]) * total[1]) : 0.f;
    args.activations[(unit / 2 * kDecodeTokens + token) * 2 * kUnit + unit % 2 * kUnit + neuron] =
        T(result);
    if (threadIdx.x == 0) {
      int group = 0;
      if constexpr (Format::kGroups) {
        group = first_group[expert] + args.down.group(first_row - args.expert_offsets[expert]);
      }
      args.units[unit] = Unit{args.down.place(expert, first_row), rows, group};
    }
    __syncthreads();  // sums are free again
  }
}

// -------------------------------------------------------------------------------------- outputs

template <class Format, class Step>
__global__ void __launch_bounds__(kOutputThreads)
    outputs_kernel(const __grid_constant__ DecodeArgs<Format> args) {
  using T = typename Format::Number;
  __shared__ float shared[kOutputWarps][8 * 4][kWarp];
  const int t = threadIdx.x, warp = t / kWarp, lane = t % kWarp;
  const int strip = blockIdx.x, part = blockIdx.y;
  const int64_t column = strip * int64_t{kStripColumns} + lane / 4 * 8;
  const int num_units = *args.num_units, steps = ceil_div(num_units, Step::kUnits);
  const int per_warp = ceil_div(steps, args.parts * kOutputWarps);
  const int first = (part * kOutputWarps + warp) * per_warp;
  const int end = min(first + per_warp, steps);
  float sums[8][4] = {};
  Step ahead[Step::kAtOnce];  // whose loads are in flight
#pragma unroll
  for (int i = 0; i < Step::kAtOnce; ++i) ahead[i].look_up(args, first + i, end, num_units);
  for (int step = first; step < end; step += Step::kAtOnce) {
#pragma unroll
    for (Step& s : ahead) s.load(args, column);
#pragma unroll
    for (int i = 0; i < Step::kAtOnce; ++i) {
      ahead[i].look_up(args, step + Step::kAtOnce + i, end, num_units);
    }
#pragma unroll
    for (int i = 0; i < Step::kAtOnce; ++i) {
      if (step + i < end) ahead[i].add(sums, args, step + i);
    }
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int c = 0; c < 4; ++c) shared[warp][j * 4 + c][lane] = sums[j][c];
  }
  __syncthreads();
  // Thread: lane (g, q), token half, column half i, blocks 4 j_half ..: four neighbouring columns,
  // because block j's columns 2q + i are columns 16 q + 8 i + j of the strip.
  const int token_half = warp / 4, i = warp / 2 % 2, j_half = warp % 2;
  float mine[4] = {};
  for (int w = 0; w < kOutputWarps; ++w) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      mine[j] += shared[w][(j_half * 4 + j) * 4 + token_half * 2 + i][lane];
  }
  if (args.parts > 1) {
    const int64_t place = (int64_t{strip} * kOutputThreads) + t;
    const int64_t stride = int64_t{gridDim.x} * kOutputThreads;
    args.sums[part * stride + place] = float4{mine[0], mine[1], mine[2], mine[3]};
    __syncthreads();
    if (!is_last_to_arrive(&args.arrived[strip], args.parts, t == 0, AnyOfAll())) return;
    for (int j = 0; j < 4; ++j) mine[j] = 0.f;
    for (int p = 0; p < args.parts; ++p) {
      const float4 other = args.sums[p * stride + place];
      mine[0] += other.x;
      mine[1] += other.y;
      mine[2] += other.z;
      mine[3] += other.w;
    }
  }
  const int token = lane / 4 + token_half * 8;
  const int64_t out = strip * int64_t{kStripColumns} + lane % 4 * 16 + i * 8 + j_half * 4;
  if (token < args.num_tokens && out < args.hidden_size) {
    if constexpr (Format::kScalesSums) {
      const float4 scales = args.down.channel_scales(out);
      mine[0] *= scales.x;
      mine[1] *= scales.y;
      mine[2] *= scales.z;
      mine[3] *= scales.w;
    }
    __stcg(reinterpret_cast<uint2*>(args.y + token * args.hidden_size + out),
           uint2{pack(mine[0], mine[1], T()), pack(mine[2], mine[3], T())});
  }
}

// ------------------------------------------------------------------------------------- launchers

struct DecodeLayout {
  int max_units, strips, parts;
  int64_t num_units, units, activations, arrived, sums, bytes;
};

// units_together: see Numbers
DecodeLayout decode_layout(const ExpertMlpParams& p, int multiprocessors, int units_together = 1) {
  DecodeLayout l{};
  l.max_units = static_cast<int>(ceil_div<int64_t>(p.intermediate_size, kUnit));
  l.max_units += p.num_experts * units_together;
  l.max_units += l.max_units % 2;
  l.strips = static_cast<int>(ceil_div<int64_t>(p.hidden_size, kStripColumns));
  // 16 warps per SM, each with 8 loads in flight
  l.parts = ceil_div(2 * multiprocessors, max(l.strips, 1));
  auto place = [&l](int64_t bytes) {
    const int64_t at = l.bytes;
    l.bytes += ceil_div<int64_t>(bytes, 256) * 256;
    return at;
  };
  l.num_units = place(sizeof(int));
  l.units = place(l.max_units * sizeof(Unit));
  l.activations = place(l.max_units * int64_t{kUnit * kDecodeTokens} * 2);
  l.arrived = place(l.strips * sizeof(unsigned));
  l.sums = place(int64_t{l.parts} * l.strips * kOutputThreads * sizeof(float4));
  return l;
}

// args: with the three matrices, to which the rest is added; outputs: its kernel for Wd.
template <class Format>
Status launch(const ExpertMlpParams& p, DecodeArgs<Format> args,
              void (*outputs)(DecodeArgs<Format>), void* workspace, Stream stream) {
  using T = typename Format::Number;
  const auto on = static_cast<cudaStream_t>(stream);
  auto* bytes = static_cast<unsigned char*>(workspace);
  const int multiprocessors = multiprocessor_count();
  if (multiprocessors == 0) return failed();
  const DecodeLayout l = decode_layout(p, multiprocessors, Format::kUnitsTogether);
  args.num_tokens = static_cast<int>(p.num_tokens);
  args.num_experts = p.num_experts;
  args.hidden_size = p.hidden_size;
  args.x_stride = p.x_stride;
  args.x = static_cast<const T*>(p.x);
  args.gates = static_cast<const float*>(p.gates);
  args.logistic = Logistic::of(p.activation);
  args.expert_offsets = p.expert_offsets;
  args.y = static_cast<T*>(p.y);
  args.max_units = l.max_units;
  args.parts = l.parts;
  args.num_units = reinterpret_cast<int*>(bytes + l.num_units);
  args.units = reinterpret_cast<Unit*>(bytes + l.units);
  args.activations = reinterpret_cast<T*>(bytes + l.activations);
  args.arrived = reinterpret_cast<unsigned*>(bytes + l.arrived);
  args.sums = reinterpret_cast<float4*>(bytes + l.sums);
  constexpr int kCtasPerSm = Format::kGroups ? 4 : 5;  // of `neurons`: what their registers allow
  const int ctas = min(l.max_units, kCtasPerSm * multiprocessors);
  const int shared_bytes = (p.num_experts + 1) * (1 + Format::kGroups) * int{sizeof(int)};
  neurons_kernel<<<ctas, kNeuronThreads, shared_bytes, on>>>(args);
  outputs<<<dim3(l.strips, l.parts), kOutputThreads, 0, on>>>(args);
  return launch_status();
}

template <class T>
Status decode_as(const ExpertMlpParams& p, void* workspace, Stream stream) {
  DecodeArgs<Numbers<T>> args{};
  args.gate_proj = weight_rows<const T>(p.gate_proj, p.gate_up, p);
  args.up_proj = weight_rows<const T>(p.up_proj, p.gate_up, p);
  args.down = DownWeights<T>(p);
  const auto outputs = p.down.hidden == 1 ? outputs_kernel<Numbers<T>, StepOfRows<T>>
                                          : outputs_kernel<Numbers<T>, StepOfColumns<T>>;
  return launch(p, args, outputs, workspace, stream);
}

template <class T, int kBits, bool kHasGroups>
Status decode_codes_as(const ExpertMlpQuantizedParams& q, void* workspace, Stream stream) {
  using Format = Codes<T, kBits, kHasGroups>;
  DecodeArgs<Format> args{};
  args.gate_proj = {q.gate_proj, q};
  args.up_proj = {q.up_proj, q};
  args.down = {q.down_proj_t, q};
  const auto outputs = outputs_kernel<Format, StepOfCodes<T, kBits, kHasGroups>>;
  return launch(q.forward, args, outputs, workspace, stream);
}

template <class T>
Status decode_codes(const ExpertMlpQuantizedParams& q, void* workspace, Stream stream) {
  if (q.format.bits == 4) return decode_codes_as<T, 4, true>(q, workspace, stream);
  return q.format.group_size ? decode_codes_as<T, 8, true>(q, workspace, stream)
                             : decode_codes_as<T, 8, false>(q, workspace, stream);
}

}  // namespace

bool decodes(Dtype dtype, int64_t num_tokens, bool keeps_activations) {
  return dtype != Dtype::kFloat32 && num_tokens <= kDecodeTokens && !keeps_activations;
}

bool decode_reads(const WeightStrides& down, int64_t hidden_size) {
  return reads(down, hidden_size) || (down.neuron == 1 && down.hidden >= 0 && down.expert >= 0);
}

int64_t decode_workspace_bytes(const ExpertMlpParams& p) {
  return decode_layout(p, multiprocessor_count()).bytes;
}

Status decode(const ExpertMlpParams& p, void* workspace, Stream stream) {
  return p.dtype == Dtype::kBFloat16 ? decode_as<__nv_bfloat16>(p, workspace, stream)
                                     : decode_as<__half>(p, workspace, stream);
}

int64_t expert_mlp_quantized_workspace_bytes(const ExpertMlpQuantizedParams& q) {
  return decode_layout(q.forward, multiprocessor_count(), kUnitsOfCodes).bytes;
}

Status expert_mlp_quantized(const ExpertMlpQuantizedParams& q, void* workspace, Stream stream) {
  const ExpertMlpParams& p = q.forward;
  const bool is_half = p.dtype == Dtype::kBFloat16 || p.dtype == Dtype::kFloat16;
  bool copies_fit = p.x_stride % 8 == 0 && aligned_16(p.x) && aligned_16(p.y);
  for (const QuantizedMatrix& m : {q.gate_proj, q.up_proj, q.down_proj_t}) {
    copies_fit = copies_fit && aligned_16(m.codes) && aligned_16(m.scales) && aligned_16(m.mins);
  }
  if (!is_half || p.num_tokens > kDecodeTokens || !reads_codes(q) || !copies_fit ||
      p.num_experts > kMaxExperts) {
    return Status::kUnsupported;
  }
  if (p.num_tokens == 0 || p.hidden_size == 0) return Status::kOk;
  return p.dtype == Dtype::kBFloat16 ? decode_codes<__nv_bfloat16>(q, workspace, stream)
                                     : decode_codes<__half>(q, workspace, stream);
}

}  // namespace dsmoe::cuda

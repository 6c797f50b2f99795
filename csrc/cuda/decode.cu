// expert_mlp for T <= 16 tokens: y_t = sum_e G[t,e] * (act(x_t Wg_e) * (x_t Wu_e)) Wd_e     bf16, fp16
//
// Reading the weights is the work: 6 S_e H bytes per active expert, once whatever T is. Everything
// else must stay out of its way. So nothing goes through shared memory on its way in: a lane loads 16
// bytes of weights, and those registers are already a fragment of mma.m16n8k16, whose 16 rows are the
// tokens. That works because a sum has no order that mma cares about: any 16 terms may be "k 0-15", as
// long as both operands agree, and any 8 columns may be "n 0-7".
//
//   neurons   a[t, unit] for units of 8 neurons of one active expert         sum over H
//             lane (g, q): 8 numbers of rows g of Wg and Wu, of x_g and x_{g+8}, at 8 q: two mma
//             a CTA per unit, the sum cut into four for its warps
//   outputs   y[t, 64 columns]                                               sum over units
//             lane (g, q): 8 numbers of rows 2q, 2q+1 of two units at 8 g. Byte permutes pair the rows
//             up; block j takes columns j, 8 + j, .. 56 + j: eight mma
//             a CTA per 64 columns and part of the units, the part cut into eight for its warps
//             Where Wd is [H,I], lane (g, q) has 8 neurons of unit q of four, of columns 8 g + j: two mma a column
//
// Sums of warps, then of parts, are added in a fixed order; the CTA that arrives last at a strip of
// columns adds the parts. Units exist on the device only: every CTA of `neurons` counts the active
// experts by itself, 128 columns of gates a round; for few rounds that is quicker than one more launch.
#include "cuda/decode.cuh"
#include "cuda/decode_steps.cuh"
#include "cuda/last_to_arrive.cuh"
#include "cuda/launch.cuh"
#include "cuda/permute.cuh"

namespace dsmoe::cuda {
namespace {

constexpr int kNeuronThreads = 128, kNeuronWarps = kNeuronThreads / kWarp;
constexpr int kOutputThreads = 256, kOutputWarps = kOutputThreads / kWarp;
constexpr int kAhead = 4;  // loads in flight per lane and row: 19 warps per SM hide DRAM

// -------------------------------------------------------------------------------------- neurons

// first_unit[e] = units of active experts before e. All threads; ends with a barrier. First a thread asks for
// everything that it needs of its experts, no round waiting for another; then it adds up neighbouring ones.
template <class T>
__device__ void count_units(const DecodeArgs<T>& args, int* first_unit) {
  __shared__ int warp_totals[kNeuronWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, num_experts = args.num_experts;
#pragma unroll 2
  for (int expert = threadIdx.x; expert < num_experts; expert += kNeuronThreads) {
    const int size = __ldg(args.expert_offsets + expert + 1) - __ldg(args.expert_offsets + expert);
    bool is_active = false;
#pragma unroll
    for (int t = 0; t < kDecodeTokens; ++t) {
      const float gate = t < args.num_tokens ? __ldg(args.gates + t * num_experts + expert) : 0.f;
      is_active |= gate != 0.f;
    }
    first_unit[expert] = is_active ? ceil_div(size, kUnit) : 0;
  }
  __syncthreads();
  const int run = ceil_div(num_experts, kNeuronThreads);
  const int begin = min(static_cast<int>(threadIdx.x) * run, num_experts);
  const int end = min(begin + run, num_experts);
  int units = 0;
  for (int expert = begin; expert < end; ++expert) units += first_unit[expert];
  const int through = warp_inclusive_sum(units);
  if (lane == kWarp - 1) warp_totals[warp] = through;
  __syncthreads();
  int start = through - units;
  for (int w = 0; w < warp; ++w) start += warp_totals[w];
  for (int expert = begin; expert < end; ++expert) {
    const int own = first_unit[expert];
    first_unit[expert] = start;
    start += own;
  }
  if (threadIdx.x == kNeuronThreads - 1) first_unit[num_experts] = start;
  __syncthreads();
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

template <class T>
__global__ void __launch_bounds__(kNeuronThreads)
    neurons_kernel(const __grid_constant__ DecodeArgs<T> args) {
  extern __shared__ int first_unit[];  // [E+1]
  __shared__ float sums[2][kNeuronWarps][4][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, q = lane % 4;
  count_units(args, first_unit);
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
    const T* gate_row = g < rows ? args.gate_proj.at(expert, first_row + g) : nullptr;
    const T* up_row = g < rows ? args.up_proj.at(expert, first_row + g) : nullptr;
    float gate[4] = {}, up[4] = {};
    constexpr int kStep = 4 * 8;  // terms of one warp's load
    for (int64_t k = warp * kStep + q * 8; k - q * 8 < args.hidden_size;
         k += kAhead * kNeuronWarps * kStep) {
      uint4 gates[kAhead], ups[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        gates[i] = row_chunk(gate_row, k + i * kNeuronWarps * kStep, args.hidden_size);
        ups[i] = row_chunk(up_row, k + i * kNeuronWarps * kStep, args.hidden_size);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const uint4 low = row_chunk(low_row, k + i * kNeuronWarps * kStep, args.hidden_size);
        const uint4 high = row_chunk(high_row, k + i * kNeuronWarps * kStep, args.hidden_size);
        mma_loaded<T>(gate, low, high, gates[i]);
        mma_loaded<T>(up, low, high, ups[i]);
      }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      sums[0][warp][c][lane] = gate[c];
      sums[1][warp][c][lane] = up[c];
    }
    __syncthreads();
    // thread c * 32 + lane finishes token g (+ 8 for c >= 2), neuron 2q + c % 2
    const int c = warp;
    float total[2] = {};
    for (int w = 0; w < kNeuronWarps; ++w) {
      total[0] += sums[0][w][c][lane];
      total[1] += sums[1][w][c][lane];
    }
    const int token = g + c / 2 * 8, neuron = 2 * q + c % 2;
    const float weight = token < args.num_tokens && neuron < rows
                             ? args.gates[token * args.num_experts + expert]
                             : 0.f;
    // not a product with 0: what an inactive pair computed may be infinite
    const float result = weight != 0.f ? weight * (args.logistic.value(total[0]) * total[1]) : 0.f;
    args.activations[(unit / 2 * kDecodeTokens + token) * 2 * kUnit + unit % 2 * kUnit + neuron] =
        T(result);
    if (threadIdx.x == 0) {
      args.units[unit] = Unit{args.down.place(expert, first_row), rows};
    }
    __syncthreads();  // sums are free again
  }
}

// -------------------------------------------------------------------------------------- outputs

template <class T, class Step>
__global__ void __launch_bounds__(kOutputThreads)
    outputs_kernel(const __grid_constant__ DecodeArgs<T> args) {
  __shared__ float shared[kOutputWarps][8 * 4][kWarp];
  const int t = threadIdx.x, warp = t / kWarp, lane = t % kWarp;
  const int strip = blockIdx.x, part = blockIdx.y;
  const int64_t column = strip * int64_t{kStripColumns} + lane / 4 * 8;
  const int num_units = *args.num_units, steps = ceil_div(num_units, Step::kUnits);
  const int per_warp = ceil_div(steps, args.parts * kOutputWarps);
  const int first = (part * kOutputWarps + warp) * per_warp;
  const int end = min(first + per_warp, steps);
  float sums[8][4] = {};
  Step ahead[Step::kAtOnce];  // eight loads in flight per lane
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
    __stcg(reinterpret_cast<uint2*>(args.y + token * args.hidden_size + out),
           uint2{pack(mine[0], mine[1], T()), pack(mine[2], mine[3], T())});
  }
}

// ------------------------------------------------------------------------------------- launchers

struct DecodeLayout {
  int max_units, strips, parts;
  int64_t num_units, units, activations, arrived, sums, bytes;
};

DecodeLayout decode_layout(const ExpertMlpParams& p, int multiprocessors) {
  DecodeLayout l{};
  l.max_units = static_cast<int>(ceil_div<int64_t>(p.intermediate_size, kUnit)) + p.num_experts;
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

template <class T>
Status decode_as(const ExpertMlpParams& p, unsigned char* workspace, cudaStream_t on) {
  const int multiprocessors = multiprocessor_count();
  if (multiprocessors == 0) return failed();
  const DecodeLayout l = decode_layout(p, multiprocessors);
  DecodeArgs<T> args{};
  args.num_tokens = static_cast<int>(p.num_tokens);
  args.num_experts = p.num_experts;
  args.hidden_size = p.hidden_size;
  args.x_stride = p.x_stride;
  args.x = static_cast<const T*>(p.x);
  args.gates = static_cast<const float*>(p.gates);
  args.gate_proj = weight_rows<const T>(p.gate_proj, p.gate_up, p);
  args.up_proj = weight_rows<const T>(p.up_proj, p.gate_up, p);
  args.down = DownWeights<T>(p);
  args.logistic = Logistic::of(p.activation);
  args.expert_offsets = p.expert_offsets;
  args.y = static_cast<T*>(p.y);
  args.max_units = l.max_units;
  args.parts = l.parts;
  args.num_units = reinterpret_cast<int*>(workspace + l.num_units);
  args.units = reinterpret_cast<Unit*>(workspace + l.units);
  args.activations = reinterpret_cast<T*>(workspace + l.activations);
  args.arrived = reinterpret_cast<unsigned*>(workspace + l.arrived);
  args.sums = reinterpret_cast<float4*>(workspace + l.sums);
  constexpr int kCtasPerSm = 5;  // 20 warps
  const int ctas = min(l.max_units, kCtasPerSm * multiprocessors);
  const int shared_bytes = (p.num_experts + 1) * int{sizeof(int)};
  neurons_kernel<<<ctas, kNeuronThreads, shared_bytes, on>>>(args);
  const auto outputs =
      p.down.hidden == 1 ? outputs_kernel<T, StepOfRows<T>> : outputs_kernel<T, StepOfColumns<T>>;
  outputs<<<dim3(l.strips, l.parts), kOutputThreads, 0, on>>>(args);
  return launch_status();
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
  const auto on = static_cast<cudaStream_t>(stream);
  auto* bytes = static_cast<unsigned char*>(workspace);
  return p.dtype == Dtype::kBFloat16 ? decode_as<__nv_bfloat16>(p, bytes, on)
                                     : decode_as<__half>(p, bytes, on);
}

}  // namespace dsmoe::cuda

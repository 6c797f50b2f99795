// START HERE. The whole torch-free kernel interface on one page.
//
// Every method (DSMoE, XMoE, MoDSE, ReMoE, LLaMA-MoE) is the same pipeline of three ops:
//
//   route       router logits -> scores, gates      gates[t,e] == 0: token t skips expert e
//   permute     gates -> lists of active pairs      expert-major for GEMMs, token-major for sums
//   expert_mlp  y_t = sum_e gates[t,e] * (act(x_t Wg_e) * (x_t Wu_e)) Wd_e    and its gradients
//
// Each op has a Params struct, one entry point in dsmoe::cpu and one in dsmoe::cuda. Callers own
// all memory; a kernel never allocates what it returns, never throws, and never ends the process.
// Shapes stand in the right-hand column:
//
//   T num_tokens    H hidden_size   I intermediate_size
//   E num_experts   R num_routed = E - num_shared   A active pairs
//
// All tensors are row-major and contiguous, except that rows of x and dy may lie further apart
// (x_stride, dy_stride), and that weights lie as models have them (WeightStrides). Expert e owns
// neurons expert_offsets[e] .. expert_offsets[e+1] of gate_proj, up_proj and down_proj_t, all
// [I,H]. Sizes may differ, may be zero, and need no alignment. Shared experts come first.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsmoe {

enum class Dtype : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr int64_t dtype_size(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

enum class Status : int32_t { kOk, kUnsupported, kWorkspaceTooSmall, kCudaError, kNoSuchPath };

const char* status_string(Status status);

// The Python module calls these from outside the ops library, hence visible.
#define DSMOE_VISIBLE [[gnu::visibility("default")]]

// ------------------------------------------------------------------------------------------ router

// A linear router: logits = x weight^T + bias, in fp32 whatever x is (fp64 if x is).
struct RouterParams {
  Dtype dtype;          // of x; weight, bias, logits: fp64 for kFloat64, else fp32
  int64_t num_tokens;   // T
  int64_t hidden_size;  // H
  int64_t num_routed;   // R
  int64_t x_stride;     // elements between rows of x
  const void* x;        // [T,H]
  const void* weight;   // [R,H]
  const void* bias;     // [R]     or null
  void* logits;         // [T,R]   output
};

// CUDA only; on the CPU the framework's matrix products do it. dbias is a plain sum of dlogits.
struct RouterBackwardParams {
  RouterParams forward;  // bias and logits are not read
  const void* dlogits;   // [T,R]   like logits
  // Outputs; null: not wanted, costs nothing
  void* dx;       // [T,H]   like x
  void* dweight;  // [R,H]   like weight
};

// ------------------------------------------------------------------------------------------- route

enum class RouteMethod : int32_t {
  kThreshold,  // DSMoE:  s = sigmoid(z), active iff s > threshold
  kTopP,       // XMoE:   s = softmax(z), active while the mass before it < threshold; rank 1 always
  kTopK,       // MoDSE, LLaMA-MoE: the top_k largest; gates: their softmax; s = softmax over all
  kRelu,       // ReMoE:  s = relu(z), active iff s > 0
};

struct RouteParams {
  Dtype dtype;  // kFloat32 or kFloat64: of logits, gates, scores
  RouteMethod method;
  int64_t num_tokens;             // T
  int32_t num_experts;            // E
  int32_t num_shared;             // the first num_shared experts are always active with gate 1
  int32_t top_k;                  // kTopK only
  bool binary;                    // gates are 1 instead of the score
  bool rescale;                   // times I_routed / (sum of active sizes): E/k for equal sizes
  double gate_scale;              // constant factor on every routed gate
  const void* logits;             // [T,R]
  const float* threshold;         // [1]
  const int32_t* expert_offsets;  // [E+1]
  void* gates;                    // [T,E]   output
  void* scores;                   // [T,R]   output
};

// The gate's derivative is taken straight through the threshold (DSMoE): d gates / d scores =
// factor for every pair, active or not. Whoever wants inactive pairs to give nothing sends dgates =
// 0 there.
struct RouteBackwardParams {
  RouteParams forward;  // gates and scores hold the forward's results
  const void* dgates;   // [T,E]
  const void* dscores;  // [T,R]   or null
  void* dlogits;        // [T,R]   output
};

// ----------------------------------------------------------------------------------------- permute

// Two views of the same A pairs. Within an expert tokens ascend; within a token experts ascend.
//   expert-major  pair_offsets[e] <= p < pair_offsets[e+1]: pair p is expert e with token_idx[p]
//   token-major   token_offsets[t] <= j < token_offsets[t+1]: slot_idx[j] is a pair of token t
struct PermuteParams {
  Dtype gates_dtype;       // kFloat32 or kFloat64
  int64_t num_tokens;      // T
  int32_t num_experts;     // E
  const void* gates;       // [T,E]
  int64_t capacity;        // length of token_idx and slot_idx; T*E always suffices
  int32_t* pair_offsets;   // [E+1]   output
  int32_t* token_idx;      // [A]     output
  int32_t* token_offsets;  // [T+1]   output
  int32_t* slot_idx;       // [A]     output
};

// -------------------------------------------------------------------------------------- expert_mlp

enum class Activation : int32_t {
  kSilu,      // g sigmoid(g)
  kGeluTanh,  // g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3)))
  kGelu,      // g/2 (1 + erf(g / sqrt(2)))
};

// Element h of neuron n of expert e, in elements from a matrix's first:
//   (expert ? e * expert : expert_offsets[e] * neuron) + n * neuron + h * hidden
//
//                                    expert   neuron   hidden
//   [I,H], or half of [2I,H]         0        H        1
//   half of [E,2S,H]                 2*S*H    H        1
//   down_proj [H,I]                  0        1        I
//   down_proj [E,H,S]                H*S      1        S
//
// One of neuron and hidden is 1; of gate_proj and up_proj it is hidden. With expert != 0 all
// experts have the same size.
struct WeightStrides {
  int64_t expert;
  int64_t neuron;
  int64_t hidden;
};

// Quantized weights: w = scale * code, or scale * code + min. Codes are signed, of 8 or 4 bits.
struct QuantFormat {
  int32_t bits;        // 8, 4; 0: weights are not quantized
  int32_t group_size;  // along the sum: 32, or a multiple of 64; 0: a scale per output channel
  bool has_min;        // of groups
};

struct ExpertMlpParams {
  Dtype dtype;                // of x, weights, y, activations; gates: fp64 for kFloat64, else fp32
  int64_t num_tokens;         // T
  int64_t hidden_size;        // H
  int64_t intermediate_size;  // I
  int32_t num_experts;        // E
  int64_t x_stride;           // elements between rows of x
  Activation activation;
  WeightStrides gate_up;          // of gate_proj and up_proj
  WeightStrides down;             // of down_proj_t
  const void* x;                  // [T,H]
  const void* gates;              // [T,E]   0 = inactive
  const void* gate_proj;          // [I,H]   null if packed
  const void* up_proj;            // [I,H]   null if packed
  const void* down_proj_t;        // [I,H]   null if packed
  const void* packed;             //         from pack_weights or pack_quantized, or null
  QuantFormat packed_format;      // CPU only
  const int32_t* expert_offsets;  // [E+1]   host memory on the CPU, device memory on CUDA
  void* y;                        // [T,H]   output
  void* activations;  // [2*T*I] output: active x Wg, x Wu for the backward; null: not kept
  bool allow_tf32;    // CUDA may round the factors of kFloat32 products to 10 bits
};

struct ExpertMlpBackwardParams {
  ExpertMlpParams forward;  // y is not read; activations null: recompute them from x
  int64_t dy_stride;        // elements between rows of dy
  const void* dy;           // [T,H]
  const void* grad_weight;  // [T,E]   weight of dgates at inactive pairs, like gates; null: 0
  WeightStrides dgate_up;   // of dgate_proj and dup_proj
  WeightStrides ddown;      // of ddown_proj_t
  // Outputs; null: not wanted, costs nothing
  void* dx;            // [T,H]
  void* dgates;        // [T,E]   like gates: <dy_t, o_e>; at inactive pairs times grad_weight
  void* dgate_proj;    // [I,H]
  void* dup_proj;      // [I,H]
  void* ddown_proj_t;  // [I,H]
};

struct PackParams {
  Dtype dtype;
  int64_t hidden_size;            // H
  int64_t intermediate_size;      // I
  int32_t num_experts;            // E
  WeightStrides gate_up;          // of gate_proj and up_proj
  WeightStrides down;             // of down_proj_t
  const void* gate_proj;          // [I,H]
  const void* up_proj;            // [I,H]
  const void* down_proj_t;        // [I,H]
  const int32_t* expert_offsets;  // [E+1]
  void* packed;                   // [packed_bytes]  output
};

// Numbers of groups along H: [I, ceil(H / group_size)]; along an expert's neurons, where groups begin
// at its first one: [G,H], G = sum over experts of ceil(S_e / group_size). Of output channels: [I] of
// gate_proj and up_proj; [H] of down_proj_t, for all experts.
struct QuantizedMatrix {
  const int8_t* codes;  // [I,H]
  const void* scales;   // fp16 of groups, fp32 of output channels
  const void* mins;     // fp16 of groups, or null
};

struct PackQuantizedParams {
  QuantFormat format;
  int64_t hidden_size;            // H
  int64_t intermediate_size;      // I
  int32_t num_experts;            // E
  QuantizedMatrix gate_proj;      // groups along H
  QuantizedMatrix up_proj;        // groups along H
  QuantizedMatrix down_proj_t;    // groups along the neurons
  const int32_t* expert_offsets;  // [E+1]
  void* packed;                   // [quantized_bytes]  output
};

// expert_mlp of few tokens from codes, on CUDA. dtype is of x and y. Codes of 4 bits are [I,H/2]:
// code + 8, of two the first in the low half. expert_offsets must be those that the scales of
// down_proj_t were made for: nothing else says how many there are.
struct ExpertMlpQuantizedParams {
  ExpertMlpParams forward;  // weights null, nothing kept
  QuantFormat format;
  QuantizedMatrix gate_proj;    // groups along H
  QuantizedMatrix up_proj;      // groups along H
  QuantizedMatrix down_proj_t;  // groups along the neurons
};

// --------------------------------------------------------------------------------------------- CPU

namespace cpu {

// Threads come from the caller, so that no second pool competes with torch's: parallel() runs
// body(arg, thread, size) on size threads at once, size <= max_size chosen by the pool; the kernels
// put barriers between their phases.
struct Team {
  int max_size;
  void* context;
  void (*parallel)(void* context, int max_size, void (*body)(void* arg, int thread, int size),
                   void* arg);
};

Status router(const RouterParams& params, const Team& team);
void route(const RouteParams& params, const Team& team);
void route_backward(const RouteBackwardParams& params, const Team& team);
// Returns A; if that is above capacity, the two lists are not written.
int64_t permute(const PermuteParams& params, const Team& team);
Status expert_mlp(const ExpertMlpParams& params, const Team& team);
Status expert_mlp_backward(const ExpertMlpBackwardParams& params, const Team& team);
int64_t packed_bytes(const PackParams& params);
Status pack_weights(const PackParams& params, const Team& team);
// For x of any dtype but kFloat64.
int64_t quantized_bytes(const PackQuantizedParams& params);
Status pack_quantized(const PackQuantizedParams& params, const Team& team);

// The instruction set in use: "portable", "avx2", "avx512", "avx512_bf16" or "amx_bf16".
DSMOE_VISIBLE const char* isa();
// All that this build and this machine have, best first, null at the end.
DSMOE_VISIBLE const char* const* isas();
// False if name is not among them; weights packed before must be packed again.
DSMOE_VISIBLE bool force_isa(const char* name);

}  // namespace cpu

// -------------------------------------------------------------------------------------------- CUDA

namespace cuda {

using Stream = void*;  // a cudaStream_t

constexpr int kMaxExperts = 2048;  // what permute's shared memory holds

enum class Path : int32_t {
  kBest,
  kSm80,   // mma.sync, on any GPU
  kSm90a,  // wgmma, and kNoSuchPath where the GPU or the build has none
};

// Of the process.
struct Settings {
  int64_t workspace_bytes = 256 << 20;  // of expert_mlp and its backward, which go in passes
  int32_t group_size = 1024;    // pairs of every expert, or columns of H, before the next ones
  int32_t router_tiles = 1024;  // so many of the router's 8 x 8 tiles fill the GPU
  int32_t multiprocessors = 0;  // that expert_mlp may fill; 0: all. Others run NCCL beside it
  Path path = Path::kBest;      // of half types; fp32 has one
  int32_t parts = 8;            // CTAs that may share a sum of `down` where tokens are few
};
DSMOE_VISIBLE void set_settings(const Settings& wanted);
// What the calls below go by in this thread from here on, whatever another thread sets meanwhile: a
// workspace that was sized by other settings would be too small.
DSMOE_VISIBLE void take_settings();

// What CUDA called the failure that this thread last got kCudaError for, "cudaErrorNotSupported".
DSMOE_VISIBLE const char* error_name();

// All work goes to the stream, and nothing waits for it: workspaces and launches have worst-case
// sizes (every pair active), known on the host, so that a CUDA graph can capture any of these calls.

// Can the CUDA kernels read weights, or write gradients, that lie like this? Others must be copied.
bool reads(const WeightStrides& strides, int64_t hidden_size);
bool writes(const WeightStrides& strides, int64_t hidden_size);
// A forward of few tokens, which reads down_proj as [H,I] and [E,H,S] too, and codes (expert_mlp_quantized).
constexpr int kDecodeTokens = 16;  // the rows of one mma
bool decodes(Dtype dtype, int64_t num_tokens, bool keeps_activations);
bool decode_reads(const WeightStrides& down, int64_t hidden_size);

// workspace: device memory of at least *_workspace_bytes, uninitialised, used until the kernels end
int64_t expert_mlp_workspace_bytes(const ExpertMlpParams& params);
int64_t expert_mlp_quantized_workspace_bytes(const ExpertMlpQuantizedParams& params);
int64_t expert_mlp_backward_workspace_bytes(const ExpertMlpBackwardParams& params);
int64_t permute_workspace_bytes(const PermuteParams& params);
int64_t router_backward_workspace_bytes(const RouterBackwardParams& params);

Status router(const RouterParams& params, Stream stream);
Status router_backward(const RouterBackwardParams& params, void* workspace, Stream stream);
Status route(const RouteParams& params, Stream stream);
Status route_backward(const RouteBackwardParams& params, Stream stream);
Status permute(const PermuteParams& params, void* workspace, Stream stream);
Status expert_mlp(const ExpertMlpParams& params, void* workspace, Stream stream);
Status expert_mlp_quantized(const ExpertMlpQuantizedParams& params, void* workspace, Stream stream);
Status expert_mlp_backward(const ExpertMlpBackwardParams& params, void* workspace, Stream stream);

}  // namespace cuda
}  // namespace dsmoe

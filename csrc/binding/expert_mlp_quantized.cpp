// dsmoe::expert_mlp_quantized: few tokens from codes of 8 or 4 bits, on CUDA.
#include <string_view>

#include "binding/cuda_limits.h"
#include "binding/device.h"
#include "binding/direct_empty.h"
#include "binding/expert_mlp.h"

namespace dsmoe::binding {
namespace {

constexpr std::string_view kDown = "down_proj_t";

struct Matrix {
  Tensor codes, scales;
  std::optional<Tensor> mins;

  QuantizedMatrix pointers() const {
    return {static_cast<const int8_t*>(codes.data_ptr()), scales.data_ptr(),
            mins ? mins->data_ptr() : nullptr};
  }
};

// As a kernel reads it.
Tensor checked(const Tensor& tensor, const char* name, const char* part, ScalarType dtype,
               std::initializer_list<int64_t> shape, const Tensor& x) {
  check(tensor.device() == x.device() && tensor.scalar_type() == dtype, "The ", part, " of ", name,
        " must be on the device of x, codes as int8 or two to a byte as uint8, scales and mins as "
        "float16 of groups and float32 of output channels.");
  check_shape(tensor, name, shape);
  return aligned(as_contiguous(tensor));
}

Matrix checked(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& mins,
               const char* name, const QuantFormat& format, int64_t neurons, const Tensor& x) {
  const bool is_down = name == kDown;
  const int64_t hidden_size = x.size(1), channels = is_down ? hidden_size : neurons;
  const auto bytes = format.bits == 8 ? ScalarType::Char : ScalarType::Byte;
  Matrix m{checked(codes, name, "codes", bytes, {neurons, hidden_size * format.bits / 8}, x)};
  if (format.group_size == 0) {
    m.scales = checked(scales, name, "scales", ScalarType::Float, {channels}, x);
    return m;
  }
  const auto groups = [&](int64_t terms) {
    return (terms + format.group_size - 1) / format.group_size;
  };
  // How many lie along the neurons, expert_offsets says, which only the device can read.
  const int64_t rows = is_down && scales.dim() == 2 ? scales.size(0) : neurons;
  check(!is_down || rows >= groups(neurons), "down_proj_t has scales of ", rows,
        " groups, but its ", neurons, " neurons make more.");
  const std::initializer_list<int64_t> shape{rows, is_down ? channels : groups(hidden_size)};
  m.scales = checked(scales, name, "scales", ScalarType::Half, shape, x);
  if (mins) m.mins = checked(*mins, name, "mins", ScalarType::Half, shape, x);
  check(m.scales.numel() < int64_t{1} << 31, name, " has 2^31 scales or more.");
  return m;
}

Tensor expert_mlp_quantized(const Tensor& x, const Tensor& gates, const Tensor& gate_codes,
                            const Tensor& gate_scales, std::optional<Tensor> gate_mins,
                            const Tensor& up_codes, const Tensor& up_scales,
                            std::optional<Tensor> up_mins, const Tensor& down_codes,
                            const Tensor& down_scales, std::optional<Tensor> down_mins,
                            const Tensor& expert_offsets, int64_t bits, int64_t group_size,
                            int64_t activation) {
  check(x.is_cuda(), "expert_mlp_quantized is for CUDA: on the CPU use pack_quantized.");
  check(x.dim() == 2 && gate_codes.dim() == 2, "x must have shape [T, H] and codes [I, H].");
  const int64_t hidden_size = x.size(1), neurons = gate_codes.size(0);
  const MlpInputs in = mlp_inputs(x, gates, expert_offsets, hidden_size, neurons);
  ExpertMlpQuantizedParams p{};
  p.forward = mlp_params(in, neurons, activation);
  check((p.forward.dtype == Dtype::kBFloat16 || p.forward.dtype == Dtype::kFloat16) &&
            p.forward.num_tokens <= cuda::kDecodeTokens,
        "Codes are decoded for at most ", cuda::kDecodeTokens,
        " tokens in bfloat16 or float16: dequantize the weights for others.");
  check(bits == 8 || (bits == 4 && group_size != 0), "bits must be 8, or 4 in groups.");
  check(group_size == 0 || group_size == 32 || (group_size > 0 && group_size % 64 == 0),
        "group_size must be 32, a multiple of 64, or 0 (a scale per output channel), but is ",
        group_size, ".");
  check(hidden_size % (128 / bits) == 0, "Codes of ", bits, " bits need a hidden size that is a ",
        "multiple of ", 128 / bits, ", but it is ", hidden_size, ": dequantize the weights.");
  check(gate_mins.has_value() == up_mins.has_value() &&
            gate_mins.has_value() == down_mins.has_value() && (group_size || !gate_mins),
        "mins belong to groups: give them for all three matrices or for none.");
  p.format = {static_cast<int32_t>(bits), static_cast<int32_t>(group_size), gate_mins.has_value()};
  const Matrix gate =
      checked(gate_codes, gate_scales, gate_mins, "gate_proj", p.format, neurons, x);
  const Matrix up = checked(up_codes, up_scales, up_mins, "up_proj", p.format, neurons, x);
  const Matrix down =
      checked(down_codes, down_scales, down_mins, "down_proj_t", p.format, neurons, x);
  p.gate_proj = gate.pointers();
  p.up_proj = up.pointers();
  p.down_proj_t = down.pointers();
  Tensor y = direct_empty(in.x, {p.forward.num_tokens, hidden_size});
  p.forward.y = y.data_ptr();
  run(
      in.x, [](const cpu::Team&) {},
      [&](cuda::Stream stream) {
        const Tensor workspace =
            direct_empty(in.x, {cuda::expert_mlp_quantized_workspace_bytes(p)}, ScalarType::Byte);
        check_status(cuda::expert_mlp_quantized(p, workspace.data_ptr(), stream));
      });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dsmoe, m) {
  m.def(
      "expert_mlp_quantized(Tensor x, Tensor gates, Tensor gate_codes, Tensor gate_scales, "
      "Tensor? gate_mins, Tensor up_codes, Tensor up_scales, Tensor? up_mins, Tensor down_codes, "
      "Tensor down_scales, Tensor? down_mins, Tensor expert_offsets, int bits, int group_size, "
      "int activation) -> Tensor y");
}

DSMOE_REGISTER(m) {
  m.impl("expert_mlp_quantized", TORCH_BOX(&expert_mlp_quantized));
}

}  // namespace dsmoe::binding

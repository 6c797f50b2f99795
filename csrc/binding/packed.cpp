// dsmoe::pack_weights and pack_quantized, and the check of what they returned.
#include "binding/packed.h"

#include <cmath>
#include <cstring>

#include "binding/device.h"
#include "binding/kept_memory.h"
#include "binding/weights.h"

namespace dsmoe::binding {
namespace {

// Stands behind packed weights, whose layout depends on it.
struct Stamp {
  char isa[24];
  Dtype dtype;  // of weights that are not quantized
  QuantFormat format;
};
constexpr int64_t kStamp = sizeof(Stamp);

const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64:
      return "float64";
    case Dtype::kFloat32:
      return "float32";
    case Dtype::kBFloat16:
      return "bfloat16";
    case Dtype::kFloat16:
      return "float16";
  }
  return "unknown";
}

// What both kinds of packing know of the weights.
template <class Params>
Params layout_of(const ExpertMlpParams& p) {
  Params layout{};
  layout.hidden_size = p.hidden_size;
  layout.intermediate_size = p.intermediate_size;
  layout.num_experts = p.num_experts;
  layout.expert_offsets = p.expert_offsets;
  return layout;
}

int64_t bytes_of(const Stamp& stamp, const ExpertMlpParams& p) {
  if (stamp.format.bits) {
    auto layout = layout_of<PackQuantizedParams>(p);
    layout.format = stamp.format;
    return cpu::quantized_bytes(layout);
  }
  auto layout = layout_of<PackParams>(p);
  layout.dtype = stamp.dtype;
  return cpu::packed_bytes(layout);
}

// Memory for packed weights, filled by pack(memory), with their stamp.
template <class F>
Tensor stamped(const Tensor& like, int64_t bytes, Dtype dtype, const QuantFormat& format, F pack) {
  Tensor packed = mapped_bytes(like, bytes + kStamp);
  check_status(pack(packed.data_ptr()));
  Stamp stamp{};
  std::strncpy(stamp.isa, cpu::isa(), sizeof(stamp.isa) - 1);
  stamp.dtype = dtype;
  stamp.format = format;
  std::memcpy(static_cast<char*>(packed.data_ptr()) + bytes, &stamp, kStamp);
  return packed;
}

Tensor checked_cpu_offsets(const Tensor& expert_offsets, int64_t intermediate_size) {
  check(expert_offsets.is_cpu() && expert_offsets.dim() == 1 && expert_offsets.size(0) > 1,
        "expert_offsets must be a CPU tensor of shape [E + 1].");
  return checked_offsets(expert_offsets, expert_offsets.size(0) - 1, intermediate_size);
}

Tensor pack_weights(const Tensor& gate_proj, std::optional<Tensor> up_proj,
                    const Tensor& down_proj_t, const Tensor& expert_offsets) {
  check(gate_proj.is_cpu(),
        "pack_weights is for the CPU; CUDA kernels read the weights as they are.");
  const Weights weights{gate_proj, up_proj, down_proj_t};
  const Tensor offsets = checked_cpu_offsets(expert_offsets, weights.intermediate_size());
  weights.check_offsets(offsets);
  PackParams p{};
  p.dtype = kernel_dtype(gate_proj, "gate_proj");
  p.hidden_size = weights.hidden_size();
  p.intermediate_size = weights.intermediate_size();
  p.num_experts = static_cast<int32_t>(offsets.size(0) - 1);
  weights.describe(p);
  p.expert_offsets = static_cast<const int32_t*>(offsets.data_ptr());
  return stamped(gate_proj, cpu::packed_bytes(p), p.dtype, {}, [&](void* memory) {
    p.packed = memory;
    return cpu::pack_weights(p, torch_team());
  });
}

// One matrix's codes and numbers; tensors are kept alive by their owner.
QuantizedMatrix matrix(const char* name, const Tensor& codes, const Tensor& scales,
                       const std::optional<Tensor>& mins, const QuantFormat& format,
                       std::initializer_list<int64_t> codes_shape,
                       std::initializer_list<int64_t> numbers_shape) {
  const ScalarType dtype = format.group_size ? ScalarType::Half : ScalarType::Float;
  check(codes.scalar_type() == ScalarType::Char && codes.is_cpu() && codes.is_contiguous(),
        "The codes of ", name, " must be a contiguous int8 tensor on the CPU.");
  check_shape(codes, name, codes_shape);
  for (const Tensor* numbers : {&scales, mins ? &*mins : nullptr}) {
    if (!numbers) continue;
    check(numbers->scalar_type() == dtype && numbers->is_cpu() && numbers->is_contiguous(),
          "The scales of ", name, " must be a contiguous ",
          format.group_size ? "float16" : "float32", " tensor on the CPU.");
    check_shape(*numbers, name, numbers_shape);
  }
  return {static_cast<const int8_t*>(codes.data_ptr()), scales.data_ptr(),
          mins ? mins->data_ptr() : nullptr};
}

Tensor pack_quantized(const Tensor& gate, const Tensor& gate_scales,
                      std::optional<Tensor> gate_mins, const Tensor& up, const Tensor& up_scales,
                      std::optional<Tensor> up_mins, const Tensor& down, const Tensor& down_scales,
                      std::optional<Tensor> down_mins, const Tensor& expert_offsets, int64_t bits,
                      int64_t group_size) {
  check(bits == 8 || bits == 4, "bits must be 8 or 4, but is ", bits, ".");
  check(group_size == 0 || group_size == 32 || (group_size > 0 && group_size % 64 == 0),
        "group_size must be 32, a multiple of 64, or 0 (a scale per output channel), but is ",
        group_size, ".");
  check(gate.dim() == 2, "gate_proj must have shape [I, H], but has ", Shape{gate}, ".");
  const int64_t I = gate.size(0), H = gate.size(1);
  const Tensor offsets = checked_cpu_offsets(expert_offsets, I);
  const auto* at = static_cast<const int32_t*>(offsets.data_ptr());
  PackQuantizedParams p{};
  p.num_experts = static_cast<int32_t>(offsets.size(0) - 1);
  const auto groups = [&](int64_t n) { return (n + group_size - 1) / group_size; };
  int64_t down_groups = 0;
  for (int e = 0; group_size && e < p.num_experts; ++e) down_groups += groups(at[e + 1] - at[e]);
  check(gate_mins.has_value() == up_mins.has_value() &&
            gate_mins.has_value() == down_mins.has_value() && (group_size || !gate_mins),
        "mins belong to groups: give them for all three matrices or for none.");
  p.format = {static_cast<int32_t>(bits), static_cast<int32_t>(group_size), gate_mins.has_value()};
  p.hidden_size = H;
  p.intermediate_size = I;
  const auto neurons = [&](const char* name, const Tensor& codes, const Tensor& scales,
                           const std::optional<Tensor>& mins) {
    return group_size ? matrix(name, codes, scales, mins, p.format, {I, H}, {I, groups(H)})
                      : matrix(name, codes, scales, mins, p.format, {I, H}, {I});
  };
  p.gate_proj = neurons("gate_proj", gate, gate_scales, gate_mins);
  p.up_proj = neurons("up_proj", up, up_scales, up_mins);
  p.down_proj_t =
      group_size
          ? matrix("down_proj_t", down, down_scales, down_mins, p.format, {I, H}, {down_groups, H})
          : matrix("down_proj_t", down, down_scales, down_mins, p.format, {I, H}, {H});
  p.expert_offsets = at;
  return stamped(gate, cpu::quantized_bytes(p), Dtype::kBFloat16, p.format, [&](void* memory) {
    p.packed = memory;
    return cpu::pack_quantized(p, torch_team());
  });
}

}  // namespace

void check_packed(const Tensor& packed, ExpertMlpParams& p) {
  check(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
            packed.numel() >= kStamp,
        "packed must be what pack_weights returned.");
  char* bytes = static_cast<char*>(packed.data_ptr());
  Stamp stamp;
  std::memcpy(&stamp, bytes + packed.numel() - kStamp, kStamp);
  stamp.isa[sizeof(stamp.isa) - 1] = 0;
  check(std::strcmp(stamp.isa, cpu::isa()) == 0, "The weights were packed for ", stamp.isa,
        ", but ", cpu::isa(), " is in use: pack them again.");
  if (stamp.format.bits)
    check(p.dtype != Dtype::kFloat64,
          "x is float64, but quantized weights take bfloat16, float16 or float32.");
  else
    check(stamp.dtype == p.dtype, "x is ", dtype_name(p.dtype), ", but the packed weights are ",
          dtype_name(stamp.dtype), ".");
  check(packed.numel() == bytes_of(stamp, p) + kStamp,
        "packed does not fit x and expert_offsets: pack the weights again.");
  p.packed = bytes;
  p.packed_format = stamp.format;
}

STABLE_TORCH_LIBRARY_FRAGMENT(dsmoe, m) {
  m.def(
      "pack_weights(Tensor gate_proj, Tensor? up_proj, Tensor down_proj_t, "
      "Tensor expert_offsets) -> Tensor packed");
  m.def(
      "pack_quantized(Tensor gate_proj, Tensor gate_scales, Tensor? gate_mins, Tensor up_proj, "
      "Tensor up_scales, Tensor? up_mins, Tensor down_proj_t, Tensor down_scales, "
      "Tensor? down_mins, Tensor expert_offsets, int bits, int group_size) -> Tensor packed");
}

DSMOE_REGISTER(m) {
  m.impl("pack_weights", TORCH_BOX(&pack_weights));
  m.impl("pack_quantized", TORCH_BOX(&pack_quantized));
}

}  // namespace dsmoe::binding

#include "binding/weights.h"

#include "binding/cuda_limits.h"
#include "binding/kept_memory.h"

namespace dsmoe::binding {
namespace {

// What the kernels of a device read and write in place.
bool in_place([[maybe_unused]] const Tensor& weight, [[maybe_unused]] const WeightStrides& s,
              [[maybe_unused]] int64_t hidden_size, [[maybe_unused]] bool decodes = false) {
#ifdef DSMOE_WITH_CUDA
  if (weight.is_cuda()) {
    const auto address = reinterpret_cast<uintptr_t>(weight.data_ptr());
    const auto reads = decodes ? cuda::decode_reads : cuda::reads;
    return address % kCudaCopyBytes == 0 && reads(s, hidden_size);
  }
#endif
  return true;
}

// As kernels.h has them, of a tensor or of the first half of every expert's neurons; nothing if that
// cannot be said.
std::optional<WeightStrides> strides_of(const Tensor& t, bool is_half) {
  const int64_t last = t.dim() - 1, neurons = t.size(last - 1), hidden_size = t.size(last);
  WeightStrides s{0, neurons > 1 ? t.stride(last - 1) : hidden_size,
                  hidden_size > 1 ? t.stride(last) : 1};
  if (s.hidden != 1 && s.neuron != 1) return {};
  if (last == 1 || t.size(0) <= 1) return s;
  const int64_t expert = t.stride(0);
  if (expert == neurons * s.neuron && !is_half) return s;  // one expert after another
  if (expert == 0) return {};                              // expanded
  s.expert = expert;
  return s;
}

void check_weight(const Tensor& weight, const char* name, const Tensor& gate_proj,
                  int64_t num_experts, int64_t neurons) {
  check_like(weight, name, gate_proj, "gate_proj");
  const int64_t hidden_size = gate_proj.size(gate_proj.dim() - 1);
  if (gate_proj.dim() == 2)
    check_shape(weight, name, {neurons, hidden_size});
  else
    check_shape(weight, name, {num_experts, neurons, hidden_size});
}

Tensor dense(const Tensor& weight) {
  return aligned(as_contiguous(weight));
}

}  // namespace

Weights::Weights(const Tensor& gate_proj, const std::optional<Tensor>& up_proj,
                 const Tensor& down_proj_t, bool decodes)
    : dims_(gate_proj.dim()),
      is_fused_(!up_proj),
      gate_given_(gate_proj),
      down_given_(down_proj_t) {
  kernel_dtype(gate_proj, "gate_proj");
  check(dims_ == 2 || dims_ == 3, "gate_proj must have shape [I, H] or [E, S, H], but has ",
        Shape{gate_proj}, ".");
  const int64_t rows = gate_proj.size(dims_ - 2);
  check(!is_fused_ || rows % 2 == 0, "gate_proj without up_proj holds both, so that ", rows,
        " neurons should be an even number.");
  hidden_size_ = gate_proj.size(dims_ - 1);
  neurons_ = is_fused_ ? rows / 2 : rows;
  if (dims_ == 3) num_experts_ = gate_proj.size(0);
  intermediate_size_ = num_experts_ * neurons_;
  if (up_proj) check_weight(*up_proj, "up_proj", gate_proj, num_experts_, neurons_);
  check_weight(down_proj_t, "down_proj_t", gate_proj, num_experts_, neurons_);
  down_is_transposed_ = down_proj_t.stride(dims_ - 1) != 1 && down_proj_t.stride(dims_ - 2) == 1;

  const WeightStrides in_order{0, hidden_size_, 1};
  const auto gate = strides_of(gate_proj, is_fused_),
             up = up_proj ? strides_of(*up_proj, false) : gate;
  if (gate && up && gate->hidden == 1 && up->hidden == 1 && gate->neuron == up->neuron &&
      gate->expert == up->expert && in_place(gate_proj, *gate, hidden_size_) &&
      (is_fused_ || in_place(*up_proj, *up, hidden_size_))) {
    gate_up_ = *gate;
    gate_ = gate_proj;
    if (up_proj) up_ = *up_proj;
  } else {
    gate_up_ = in_order;
    gate_ = dense(is_fused_ ? half(gate_proj, 0) : gate_proj);
    up_ = dense(is_fused_ ? half(gate_proj, 1) : *up_proj);
  }
  const auto down = strides_of(down_proj_t, false);
  const bool reads_down = down && in_place(down_proj_t, *down, hidden_size_, decodes);
  down_ = reads_down ? *down : in_order;
  down_proj_t_ = reads_down ? down_proj_t : dense(down_proj_t);
}

void Weights::check_offsets(const Tensor& offsets) const {
  if (dims_ == 2) return;
  check(offsets.size(0) == num_experts_ + 1, "expert_offsets cuts ", offsets.size(0) - 1,
        " experts, but the weights have ", num_experts_, ".");
  if (!offsets.is_cpu()) return;
  const int32_t* o = static_cast<const int32_t*>(offsets.data_ptr());
  bool is_equal = true;
  for (int64_t e = 0; e <= num_experts_; ++e) is_equal = is_equal && o[e] == e * neurons_;
  check(is_equal, "expert_offsets must cut weights of shape [E, S, H] into experts of ", neurons_,
        " neurons.");
}

Tensor Weights::half(const Tensor& fused, int64_t which) const {
  Tensor t = fused;
  return torch::stable::narrow(t, dims_ - 2, which * neurons_, neurons_);
}

void* Weights::second_half(void* fused, int64_t neuron_stride) const {
  return static_cast<char*>(fused) +
         neurons_ * neuron_stride * dtype_size(kernel_dtype(gate_given_, "gate_proj"));
}

Tensor Weights::gradient_like(const Tensor& weight, bool is_transposed) const {
  const int64_t rows = weight.size(dims_ - 2);
  const int64_t first = is_transposed ? hidden_size_ : rows,
                second = is_transposed ? rows : hidden_size_;
  const Tensor memory = dims_ == 2 ? kept_empty(weight, {first, second})
                                   : kept_empty(weight, {num_experts_, first, second});
  return is_transposed ? torch::stable::transpose(memory, dims_ - 2, dims_ - 1) : memory;
}

Weights::Gradients Weights::make_gradients(ExpertMlpBackwardParams& p, bool wants_gate,
                                           bool wants_up, bool wants_down) const {
  const auto make = [&](bool wanted, const Tensor& like, bool is_transposed) {
    return wanted ? gradient_like(like, is_transposed) : direct_empty(like, {0});
  };
  Gradients out{make(wants_gate, gate_given_, false), make(wants_up && !is_fused_, *gate_, false),
                make(wants_down, down_given_, down_is_transposed_)};
  const WeightStrides in_order{0, hidden_size_, 1};
  p.dgate_up = p.ddown = in_order;
  // A slab of its own for what kernels do not write in place.
  const auto slab = [&](const Tensor& to) {
    Tensor from = kept_empty(to, {intermediate_size_, hidden_size_});
    out.copies.push_back({to, from});
    return from.data_ptr();
  };
  if (!is_fused_ || dims_ == 2 || gate_given_.is_cpu()) {
    if (is_fused_ && dims_ == 3) p.dgate_up.expert = 2 * neurons_ * hidden_size_;
    if (wants_gate) p.dgate_proj = out.gate_proj.data_ptr();
    if (wants_gate && is_fused_) p.dup_proj = second_half(p.dgate_proj, hidden_size_);
    if (wants_up && !is_fused_) p.dup_proj = out.up_proj.data_ptr();
  } else if (wants_gate) {
    p.dgate_proj = slab(half(out.gate_proj, 0));
    p.dup_proj = slab(half(out.gate_proj, 1));
  }
  if (!wants_down) return out;
  p.ddown_proj_t = out.down_proj_t.data_ptr();
  if (!down_is_transposed_) return out;
  if (gate_given_.is_cpu()) {
    p.ddown = {dims_ == 3 ? neurons_ * hidden_size_ : 0, 1, neurons_};
  } else {
    p.ddown_proj_t = slab(out.down_proj_t);
  }
  return out;
}

void Weights::Gradients::finish() {
  for (Copy& copy : copies) {
    // Slabs have experts in their rows.
    Tensor from =
        copy.to.dim() == 2
            ? copy.from
            : torch::stable::view(copy.from, {copy.to.size(0), copy.to.size(1), copy.to.size(2)});
    torch::stable::copy_(copy.to, from);
  }
}

}  // namespace dsmoe::binding

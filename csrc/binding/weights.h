// The experts' weights as kernels.h describes them, made of the tensors that models have.
#pragma once

#include <vector>

#include "binding/checks.h"

namespace dsmoe::binding {

// gate_proj and up_proj [I,H], or [E,S,H] with I = E S; or both in gate_proj, gate's neurons before up's:
// [2I,H] or [E,2S,H]. down_proj_t [I,H] or [E,S,H]. Any strides: what a kernel cannot read is copied.
class Weights {
 public:
  // decodes: for a forward of few tokens, whose kernels on CUDA read more.
  Weights(const Tensor& gate_proj, const std::optional<Tensor>& up_proj, const Tensor& down_proj_t,
          bool decodes = false);

  int64_t hidden_size() const { return hidden_size_; }
  int64_t intermediate_size() const { return intermediate_size_; }
  // Experts that are a dimension are equal. On CUDA only their number is checked.
  void check_offsets(const Tensor& offsets) const;

  // Into ExpertMlpParams or PackParams.
  template <class Params>
  void describe(Params& p) const {
    p.gate_up = gate_up_;
    p.down = down_;
    p.gate_proj = gate_->data_ptr();
    p.up_proj = up_ ? up_->data_ptr() : second_half(gate_->data_ptr(), gate_up_.neuron);
    p.down_proj_t = down_proj_t_->data_ptr();
  }

  // In the shapes of what was given: contiguous, or down_proj_t's a transposed view where that was one.
  // Of those that are not wanted, and of up_proj where gate_proj holds both: no elements.
  struct Gradients {
    Tensor gate_proj, up_proj, down_proj_t;
    struct Copy {
      Tensor to, from;
    };
    std::vector<Copy> copies = {};  // left to do when the kernel is done
    void finish();
  };
  Gradients make_gradients(ExpertMlpBackwardParams& p, bool wants_gate, bool wants_up,
                           bool wants_down) const;

 private:
  // Of a tensor as large as gate_proj, where that holds both.
  void* second_half(void* fused, int64_t neuron_stride) const;
  Tensor half(const Tensor& fused, int64_t which) const;
  Tensor gradient_like(const Tensor& weight, bool is_transposed) const;

  int64_t dims_, num_experts_ = 1,
                 neurons_;  // neurons: of an expert, or of all if they are no dimension
  int64_t hidden_size_, intermediate_size_;
  bool is_fused_, down_is_transposed_;
  const Tensor &gate_given_, &down_given_;
  std::optional<Tensor> gate_, up_, down_proj_t_;  // as kernels read them
  WeightStrides gate_up_, down_;
};

}  // namespace dsmoe::binding

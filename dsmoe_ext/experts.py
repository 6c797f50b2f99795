"""experts_implementation="dsmoe": mixture-of-experts models of transformers on `sparse_ffn`.

    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="dsmoe")
    model.set_experts_implementation("dsmoe")

Nothing is converted: the kernels read gate_up_proj [E,2S,H] and down_proj [E,H,S] where they lie
and write their gradients in the same layout. In inference on the CPU the weights are packed at the
first call (as much memory again) and packed anew when they have changed.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_ext import _C
from dsmoe_ext.gated_mlp import activation_name
from dsmoe_ext.ops import PackedWeights, pack_weights, sparse_ffn

_NAME = "dsmoe"


def register(moe: Any) -> None:
    """Called with the module transformers.integrations.moe, once that is imported."""
    moe.ExpertsInterface.register(_NAME, experts_forward)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The forward of a transformers experts module, as its ExpertsInterface calls it.

    Args:
        hidden_states: [T,H].
        top_k_index: [T,K] experts of each token; an index that is no expert's (expert parallelism:
            another process has it) adds nothing.
        top_k_weights: [T,K]; their gradient is exact where they are 0, too.

    Returns:
        [T,H] like hidden_states.

    Raises:
        NotImplementedError: the module computes something else than down(act(gate x) * up x).
    """
    activation = _activation_of(self)
    gate_up, down = self.gate_up_proj, self.down_proj
    num_experts, down_t = gate_up.shape[0], down.transpose(1, 2)
    offsets = torch.arange(num_experts + 1, dtype=torch.int32, device=down.device) * down.shape[2]
    x = hidden_states.to(gate_up.dtype)
    index = top_k_index.clamp(max=num_experts)
    gate_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gates = _by_expert(index, top_k_weights.to(gate_dtype), num_experts)
    if _is_inference(self, x, gates):
        packed = _packed(self, offsets, activation)
        return sparse_ffn(x, gates, packed).to(hidden_states.dtype)
    selected = None
    if gates.requires_grad:
        selected = _by_expert(index, torch.ones_like(index, dtype=gate_dtype), num_experts)
        selected = selected.clamp(max=1)
    y = sparse_ffn(
        x, gates, gate_up, None, down_t, offsets, activation=activation, grad_weight=selected
    )
    return y.to(hidden_states.dtype)


def _by_expert(index: Tensor, values: Tensor, num_experts: int) -> Tensor:
    """values [T,K] summed into [T,E]; index num_experts falls off."""
    columns = values.new_zeros(len(index), num_experts + 1).scatter_add(1, index, values)
    return columns[:, :num_experts]


def _activation_of(experts: Any) -> str:
    """Of the gate; refuses experts that are not what `sparse_ffn` computes."""
    words, activation = activation_name(getattr(experts, "act_fn", None))
    if not getattr(experts, "has_gate", True):
        other = "experts without a gate projection"
    elif getattr(experts, "has_bias", False):
        other = "expert biases"
    elif getattr(experts, "is_transposed", False):
        other = "transposed expert weights"
    elif not getattr(experts, "is_concatenated", True):
        other = "interleaved gate and up weights"
    elif getattr(experts, "has_post_expert_norm", False):
        other = "a norm behind each expert"
    elif type(experts)._apply_gate.__name__ != "_default_apply_gate":
        other = "a gate function of its own"
    elif activation is not None:
        return activation
    else:
        other = f"the activation {words}"
    raise NotImplementedError(
        f'{type(experts).__name__} has {other}, which experts_implementation="{_NAME}" does not '
        'compute: use "grouped_mm", "batched_mm" or "eager" for this model.'
    )


# ------------------------------------------------------------------------------------------ packing

# module -> (what its weights were, packed). Not in the module: it is no part of what is copied,
# pickled or moved with it.
_packs: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def _is_inference(experts: Any, x: Tensor, gates: Tensor) -> bool:
    """Whether packed weights may serve. Weights that are computed at every access, as adapters'
    are, are read where they lie."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not x.is_cpu:
        return False
    weights: list[Any] = [experts._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    if not all(type(weight) is nn.Parameter for weight in weights):
        return False
    needs_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (x, gates, *weights))
    if experts.training or needs_gradients:
        _packs.pop(experts, None)
        return False
    return True


def _packed(experts: Any, offsets: Tensor, activation: str) -> PackedWeights:
    gate_up, down = experts.gate_up_proj, experts.down_proj
    key = (_state(gate_up), _state(down), _C.isa())
    if _packs.get(experts, (None,))[0] != key:
        _packs.pop(experts, None)  # its memory first
        down_t = down.transpose(1, 2)
        packed = pack_weights(gate_up, None, down_t, offsets, activation=activation)
        _packs[experts] = (key, packed)
    return _packs[experts][1]


def _state(weight: Tensor) -> tuple[Any, ...]:
    """What changes with a weight: its memory, its version, and, for optimizers that leave the
    version as it is (fused ones), some of its numbers."""
    numbers = weight.detach().flatten()[:: max(weight.numel() // 8, 1)]
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, weight.dtype, tuple(numbers.tolist())

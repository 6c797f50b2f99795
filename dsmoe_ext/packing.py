"""Weights in the layout that the CPU's inference kernels read fastest, as they are or rounded."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsmoe_ext import _C  # noqa: F401  registers the ops
from dsmoe_ext.quantization.codes import QuantizedWeights, quantize_weights
from dsmoe_ext.reference import activation_index, split_weights

_ops = torch.ops.dsmoe


@dataclass(frozen=True)
class PackedWeights:
    """Weights in the layout that one instruction set's inference kernels read (`pack_weights`)."""

    data: Tensor  # uint8, opaque
    expert_offsets: Tensor  # int32 [E+1]
    hidden_size: int
    intermediate_size: int
    dtype: torch.dtype  # of the weights that were packed; quantized ones take any but float64
    activation: str = "silu"
    bits: int = 0  # 8 or 4: quantized
    group_size: int = 0

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether x may have this dtype."""
        return dtype != torch.float64 if self.bits else dtype == self.dtype

    @property
    def form(self) -> str:
        """In words: "bfloat16", "8 bits", "4 bits in groups of 32"."""
        if not self.bits:
            return str(self.dtype).removeprefix("torch.")
        return f"{self.bits} bits" + (f" in groups of {self.group_size}" * bool(self.group_size))


def pack_weights(
    gate_proj: Tensor,
    up_proj: Tensor | None,
    down_proj_t: Tensor,
    expert_offsets: Tensor,
    *,
    activation: str = "silu",
    bits: int = 0,
    group_size: int | None = None,
    symmetric: bool | None = None,
) -> PackedWeights:
    """Copies weights, as `sparse_ffn` takes them, into the layout that the CPU inference kernels
    read fastest.

    Explicit, because it costs time and as much memory again: nothing packs behind your back, and
    later changes of the weights do not reach the copy.

    Args:
        bits: 8 or 4: rounded to codes (`quantization.codes.quantize_weights`, which takes
            group_size and symmetric), multiplied with x of 16 bits (float32: 24) and summed in
            float32.
    """
    activation_index(activation)
    if bits:
        weights = split_weights(gate_proj, up_proj, down_proj_t)
        quantized = quantize_weights(*weights, expert_offsets, bits=bits, group_size=group_size,
                                     symmetric=symmetric, activation=activation)  # fmt: skip
        return replace(pack_quantized(quantized), dtype=gate_proj.dtype)
    with torch.no_grad():
        data = _ops.pack_weights(gate_proj, up_proj, down_proj_t, expert_offsets)
    *experts, hidden_size = down_proj_t.shape
    offsets = expert_offsets.clone()
    sizes = (hidden_size, math.prod(experts))
    return PackedWeights(data, offsets, *sizes, gate_proj.dtype, activation)


def pack_quantized(weights: QuantizedWeights) -> PackedWeights:
    """Lays quantized weights out for the CPU inference kernels; `weights` may go afterwards."""
    activation_index(weights.activation)
    assert weights.expert_offsets is not None
    matrices = (weights.gate_proj, weights.up_proj, weights.down_proj_t)
    tensors = [tensor for m in matrices for tensor in (m.codes, m.scales, m.mins)]
    form = (weights.bits, weights.group_size)
    data = _ops.pack_quantized(*tensors, weights.expert_offsets, *form)
    intermediate_size, hidden_size = weights.gate_proj.codes.shape
    sizes = (hidden_size, intermediate_size)
    offsets = weights.expert_offsets.clone()
    return PackedWeights(data, offsets, *sizes, torch.bfloat16, weights.activation, *form)

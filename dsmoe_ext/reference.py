"""The specification: the ops of this package in plain PyTorch, with the signatures of `ops`.

Every kernel is tested against these functions in float64. They are written to be read, not to be
fast: the sparse FFN computes every expert for every token and multiplies by the gate.

Shapes: T tokens, H hidden_size, I intermediate_size, E experts, R = E - num_shared routed experts,
A active pairs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

METHODS = ("threshold", "top_p", "top_k", "relu")
GATES = ("scores", "binary")
ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "gelu": F.gelu,
}


def activation_index(name: str) -> int:
    """As the C++ ops take it."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, but is {name!r}.")
    return list(ACTIVATIONS).index(name)


def expert_sizes(expert_offsets: Tensor) -> Tensor:
    """Sizes [E] (int64) of the experts that expert_offsets [E+1] cuts out of I."""
    return expert_offsets.long().diff()


def expand_experts(
    per_expert: Tensor, expert_offsets: Tensor, num_neurons: int | None = None
) -> Tensor:
    """Repeats each expert's column over its neurons: [T,E] -> [T,I]. num_neurons: I, where it must
    be known before the offsets are."""
    sizes = expert_sizes(expert_offsets)
    return per_expert.repeat_interleave(sizes, dim=1, output_size=num_neurons)


def active_mask(logits: Tensor, threshold: Tensor, method: str, top_k: int) -> Tensor:
    """Active routed pairs, bool [T,R]. A NaN logit is active, so that it shows in the output."""
    if method == "threshold":
        return ~(logits.sigmoid() <= threshold)
    if method == "relu":
        return ~(logits <= 0)
    ranks = logits.argsort(dim=1, descending=True, stable=True)
    if method == "top_k":
        return torch.zeros_like(logits, dtype=torch.bool).scatter(1, ranks[:, :top_k], True)
    sorted_scores = logits.softmax(1).gather(1, ranks)
    mass_before = sorted_scores.cumsum(1) - sorted_scores
    keep = ~(mass_before >= threshold) | (threshold >= 1)  # 1 means every expert, rounding or not
    keep = keep | (torch.arange(keep.shape[1], device=keep.device) == 0)
    return torch.zeros_like(keep).scatter(1, ranks, keep)


def route(
    logits: Tensor,
    threshold: Tensor | float,
    expert_offsets: Tensor,
    *,
    method: str = "threshold",
    top_k: int = 0,
    gates: str = "scores",
    rescale: bool = True,
    gate_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Turns router logits [T,R] into gates [T,E] and scores [T,R]; see `dsmoe_ext.ops.route`."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    sizes = expert_sizes(expert_offsets).to(logits)
    num_shared = len(sizes) - logits.shape[1]
    mask = active_mask(logits.detach(), torch.as_tensor(threshold).to(logits), method, top_k)
    routed_sizes = sizes[num_shared:]
    if method == "threshold":
        scores = logits.sigmoid()
    elif method == "relu":
        scores = logits.relu()
    else:
        scores = logits.softmax(1)
    value = scores
    if method == "top_k":  # the softmax over the kept logits alone
        value = logits.masked_fill(~mask, float("-inf")).softmax(1)
    mask = mask & (value != 0)  # a gate that underflows to 0 skips its expert: it does not count
    kept = mask.to(value) if gates == "binary" else torch.where(mask, value, 0.0)
    straight_through = kept.detach() + value - value.detach()
    factor = torch.full_like(logits[:, :1], gate_scale)
    if rescale:
        active = (mask * routed_sizes).sum(1, keepdim=True)
        factor = factor * torch.where(active > 0, routed_sizes.sum() / active, 1.0)
    shared = logits.new_ones(logits.shape[0], num_shared)
    return torch.cat([shared, straight_through * factor], dim=1), scores


def permute(gates: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists of the active pairs of gates [T,E]; see `dsmoe_ext.ops.permute`."""
    mask = gates != 0

    def offsets(counts: Tensor) -> Tensor:
        return F.pad(counts.cumsum(0), (1, 0)).int()

    token_idx = mask.t().nonzero()[:, 1].int()
    pair = (mask.t().flatten().cumsum(0) - 1).view(mask.shape[1], mask.shape[0]).t()
    return offsets(mask.sum(0)), token_idx, offsets(mask.sum(1)), pair[mask].int()


class _WeightInactiveGates(torch.autograd.Function):
    """Identity whose gradient is multiplied by grad_weight where the gate is 0."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, grad_weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(gates, grad_weight)
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, dgates: Tensor) -> tuple[Tensor | None, ...]:
        gates, grad_weight = ctx.saved_tensors
        weight = torch.zeros_like(gates) if grad_weight is None else grad_weight
        return torch.where(gates == 0, dgates * weight, dgates), None


def split_weights(
    gate_proj: Tensor, up_proj: Tensor | None, down_proj_t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """gate_proj, up_proj and down_proj_t as [I,H] each, of any of the shapes that
    `ops.sparse_ffn` takes."""
    if up_proj is None:
        gate_proj, up_proj = gate_proj.chunk(2, dim=-2)
    return gate_proj.flatten(0, -2), up_proj.flatten(0, -2), down_proj_t.flatten(0, -2)


def sparse_ffn(
    x: Tensor,
    gates: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor | None,
    down_proj_t: Tensor,
    expert_offsets: Tensor,
    *,
    activation: str = "silu",
    grad_weight: Tensor | None = None,
) -> Tensor:
    """y [T,H] = sum over experts of gate * (act(x Wg) * (x Wu)) Wd; see `ops.sparse_ffn`."""
    gates = _WeightInactiveGates.apply(gates, grad_weight)
    gate_proj, up_proj, down_proj_t = split_weights(gate_proj, up_proj, down_proj_t)
    activations = ACTIVATIONS[activation](x @ gate_proj.t()) * (x @ up_proj.t())
    gates = expand_experts(gates, expert_offsets, len(down_proj_t))
    return (activations * gates.to(x.dtype)) @ down_proj_t

"""The order of every layer's neurons for a partition by name (partition.py), without a router."""

from typing import Any

import torch
from torch import Tensor, nn

from dsmoe_ext import partition
from dsmoe_ext.gated_mlp import GatedMLP, kind_of, mlp_activations
from dsmoe_ext.layout import expert_layout

PARTITIONS = ("contiguous", "random", "gate_rows", "coactivation")
# Contributions of so many tokens are kept at most, a layer at a time.
MAX_TOKENS = 4096


@torch.no_grad()
def neuron_orders(
    model: nn.Module, name: str, *, ids: Tensor | None = None, seed: int = 0, **layout: Any
) -> list[Tensor] | None:
    """By layer int64 [I], to be given to `sparsify` as permutations; None: the model's own order.

    name: one of PARTITIONS. ids [N,L]: text for "coactivation". layout: num_experts, expert_sizes,
    shared_size as for sparsify; a shared expert is a cluster like the others.
    """
    from dsmoe_ext.models.adopt import gated_mlps, text_model

    if name not in PARTITIONS:
        raise ValueError(f"the partition must be one of {', '.join(PARTITIONS)}, got {name!r}")
    if name == "contiguous":
        return None
    mlps = list(gated_mlps(text_model(model)).values())
    orders = []
    for index, mlp in enumerate(mlps):
        found = kind_of(mlp)
        sizes = expert_layout(found.intermediate_size, **layout)
        if name == "random":
            order = partition.random_order(found.intermediate_size, seed=seed + index)
        elif name == "gate_rows":
            gate = found.weights(mlp)[0][: found.intermediate_size]
            order = partition.gate_rows(gate, sizes, seed=seed + index)
        else:
            if ids is None:
                raise ValueError("the partition by coactivation needs text to look at")
            seen = contributions(model, mlp, found, ids)
            order = partition.coactivation(seen, sizes, seed=seed + index)
        orders.append(order)
    return orders


def contributions(model: nn.Module, mlp: nn.Module, found: GatedMLP, ids: Tensor) -> Tensor:
    """|act(gate x) up x| ‖d‖ of every neuron of one MLP, [T,I], for the tokens of ids [N,L]."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        weights = found.weights(mlp)
        hidden = mlp_activations(args[0].flatten(0, -2), weights, found.activation)
        seen.append(hidden.abs() * weights[-1].norm(dim=0))

    handle = mlp.register_forward_hook(note)
    try:
        for window in ids[: max(1, MAX_TOKENS // ids.shape[1])].split(1):
            model(input_ids=window, use_cache=False)
    finally:
        handle.remove()
    return torch.cat(seen)

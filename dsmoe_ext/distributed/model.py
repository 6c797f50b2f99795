"""A sparse model whose routed experts lie on several ranks, and back.

    model = AutoModelForCausalLM.from_pretrained(folder)     on every rank
    parallelize(model, mesh)                                 each keeps its routed experts
    whole(model)                                             all ranks have all again, to be saved

Routers and shared experts stay on every rank, like attention: wrap the model in DDP or FSDP2 for
them. All ranks must call the model equally often, with any number of tokens each.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dsmoe_ext.distributed.experts import WEIGHTS, ParallelExperts
from dsmoe_ext.distributed.placement import Placement, place
from dsmoe_ext.ffn import DSMoEFFN
from dsmoe_ext.layers import ffn_layers
from dsmoe_ext.reference import split_weights
from dsmoe_ext.sliced_ffn import SlicedFFN
from dsmoe_ext.weights import Weight

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class ParallelFFN(nn.Module):
    """The experts of a DSMoEFFN, the routed ones over the ranks: what its run_experts calls.

    routed   ParallelExperts
    shared   a SlicedFFN with the shared expert, on every rank; None: there is none
    """

    def __init__(self, ffn: DSMoEFFN, placement: Placement, mesh: "DeviceMesh", **options: Any):
        super().__init__()
        weights, size, start = split_weights(*ffn.expert_weights()), ffn.shared_size, ffn.num_shared
        self.num_shared, self.shared = start, None
        if start:
            gate, up, down = (weight.detach()[:size].clone() for weight in weights)
            self.shared = SlicedFFN(
                ffn.hidden_size,
                [size],
                activation=ffn.activation,
                weights=[gate, up, down.t().contiguous()],
                device=gate.device,
            )
        self.routed = ParallelExperts(
            [weight[size:] for weight in weights],
            ffn.sizes[start:],
            placement.experts_per_rank,
            mesh,
            order=placement.order,
            activation=ffn.activation,
            **options,
        )

    def forward(self, tokens: Tensor, gates: Tensor, grad_weight: Tensor | None = None) -> Tensor:
        """y [T,H] of this rank's tokens [T,H] and gates [T,E]; grad_weight as for sparse_ffn."""
        start = self.num_shared
        own_weight = None if grad_weight is None else grad_weight[:, start:]
        y = self.routed(tokens, gates[:, start:], own_weight)
        return y if self.shared is None else y + self.shared.run_experts(tokens, gates[:, :start])


def parallelize(
    model: nn.Module,
    mesh: "DeviceMesh",
    plan: Sequence[Sequence[Sequence[int]]] | None = None,
    **options: Any,
) -> nn.Module:
    """Leaves every rank of a mesh its part of the routed experts of all layers, in place.

    Args:
        model: the same sparse model on every rank. Not quantized; packing is undone.
        mesh: a one-dimensional DeviceMesh.
        plan: by layer and rank, the numbers of the routed experts, as `dsmoe place --out` writes
            them; None: evenly by parameters.
        options: as for ParallelExperts.
    """
    layers = ffn_layers(model)
    if plan is not None and len(plan) != len(layers):
        raise ValueError(f"the plan has {len(plan)} layers, the model {len(layers)}")
    for index, ffn in enumerate(layers):
        if ffn.experts is not None:
            raise ValueError("quantized experts cannot be spread over ranks")
        ffn.refuse_adapters()
        sizes = ffn.sizes[ffn.num_shared :]
        if plan is None:
            placement = place(sizes, sizes, mesh.size())
        else:
            placement = Placement([list(rank) for rank in plan[index]])
        ffn.parallel = ParallelFFN(ffn, placement, mesh, **options)
        ffn._packed = None
        for name in ffn.names:
            delattr(ffn, name)
    return model


@torch.no_grad()
def whole(model: nn.Module) -> nn.Module:
    """Undoes parallelize, in place and to the bit; all ranks must call it."""
    for ffn in ffn_layers(model):
        if ffn.parallel is None:
            continue
        assert isinstance(ffn.parallel, ParallelFFN)
        gate, up, down = (_whole(ffn.parallel, index) for index in range(3))
        weights = [torch.cat([gate, up]) if len(ffn.names) == 2 else gate, up, down.t()]
        if len(ffn.names) == 2:
            del weights[1]
        frozen = not ffn.parallel.routed.gate_proj.requires_grad
        for name, weight in zip(ffn.names, weights, strict=True):
            ffn.add_module(name, Weight(nn.Parameter(weight.contiguous(), not frozen)))
        ffn.parallel = None
    return model


def _whole(parallel: ParallelFFN, index: int) -> Tensor:
    """One of gate, up and down, [I,H], from all ranks: experts in the order of their numbers."""
    routed = parallel.routed
    rows = getattr(routed, WEIGHTS[index])
    rows = rows.to_local() if isinstance(rows, DTensor) else rows
    own = dict(zip(routed.own_experts, rows.split(routed.own_sizes), strict=True))
    parts = []
    if parallel.shared is not None:
        parts = [split_weights(*parallel.shared.expert_weights())[index]]
    homes = {e: rank for rank, c in enumerate(routed.columns) for e in routed.order[c]}
    for expert, size in enumerate(routed.expert_sizes):
        part = rows.new_empty(size, rows.shape[1])
        if expert in own:
            part.copy_(own[expert])
        dist.broadcast(part, group_src=homes[expert], group=routed.group)
        parts.append(part)
    return torch.cat(parts)

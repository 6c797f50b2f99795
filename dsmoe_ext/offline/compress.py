"""Experts as what they have in common and what is left (ResMoE, arXiv 2503.06881).

    W_e = [gate_e, up_e, down_eᵀ]  [S,3H]: the neurons of expert e, whose order means nothing
    C   = argmin Σ_e min_P ‖P W_e - C‖²       the Wasserstein barycentre of the experts' neurons
    W_e ≈ C + A_e B_e                          A_e [S,r], B_e [r,H] by SVD, for each of the three

The barycentre is found by turns: neurons are assigned to the centre's (the cheapest one-to-one
assignment), then the centre is their mean, until nothing moves. A layer's R experts then take
S·H + R·r·(S + H) numbers a matrix in place of R·S·H.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dsmoe_ext.convert import sharing_copy
from dsmoe_ext.ffn import DSMoEFFN
from dsmoe_ext.layers import ffn_layers
from dsmoe_ext.models.options import options_of
from dsmoe_ext.offline.assignment import cheapest_assignment
from dsmoe_ext.reference import split_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_ROUNDS = 30


def barycentre(experts: Tensor) -> tuple[Tensor, Tensor]:
    """(order int64 [R,S], centre [S,N]) of experts [R,S,N]: neuron order[e,n] of e goes to n."""
    experts = experts.double()
    squares = experts.square().sum(2)
    centre = experts[0]
    order = torch.zeros(0, device=experts.device)
    for _ in range(MAX_ROUNDS):
        # ‖a - c‖² but for what no assignment changes. Row of the centre -> neuron of the expert.
        costs = centre.square().sum(1)[:, None] + squares[:, None, :] - 2 * centre @ experts.mT
        rows = [torch.from_numpy(cheapest_assignment(cost)) for cost in costs.cpu().numpy()]
        found = torch.stack(rows).to(experts.device)
        if torch.equal(found, order):
            break
        order = found
        centre = torch.stack([e[rows] for e, rows in zip(experts, order, strict=True)]).mean(0)
    return order, centre


def low_rank(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [R,S,r], B [R,r,H] with A B the nearest of that rank to residual [R,S,H]."""
    left, values, right = torch.linalg.svd(residual, full_matrices=False)
    root = values[:, :rank].sqrt()
    return left[:, :, :rank] * root[:, None, :], root[:, :, None] * right[:, :rank]


@torch.no_grad()
def compress(model: "PreTrainedModel", rank: int) -> tuple[object, float]:
    """(a sparse model whose routed experts are a centre and residuals of this rank, the squared
    error of their weights relative to the weights' squares).

    model: a sparse model with equal routed experts; shared experts stay as they are, and all but
    the experts is shared with it. The result trains, packs, merges and saves as any sparse model.
    """
    layers = ffn_layers(model)
    _check(layers, rank)
    compressed = sharing_copy(model)
    lost = power = 0.0
    for ffn in ffn_layers(compressed):
        shared, num_experts = ffn.shared_size, ffn.num_experts
        whole = split_weights(*ffn.expert_weights())
        routed = [w[shared:].unflatten(0, (num_experts, -1)).double() for w in whole]
        order, centre = barycentre(torch.cat(routed, dim=2))
        rows = torch.arange(num_experts, device=order.device)[:, None]
        matrices: list[tuple[Tensor, ...]] = []
        for matrix, middle in zip(routed, centre.chunk(3, dim=1), strict=True):
            residual = matrix[rows, order] - middle
            factors = low_rank(residual, rank)
            lost += (residual - factors[0] @ factors[1]).square().sum().item()
            power += matrix.square().sum().item()
            matrices.append((middle, *factors))
        places = (order + order.shape[1] * rows).flatten() + shared
        ffn.permutation = ffn.permutation.clone()
        ffn.permutation[shared:] = ffn.permutation[places]
        ffn.use_factors((shared, ffn.sizes[-1], num_experts), rank)
        _fill(ffn, [w[:shared] for w in whole], matrices)
    options_of(compressed)["compression"] = {"rank": rank}
    return compressed, lost / power


def _fill(ffn: DSMoEFFN, shared: list[Tensor], matrices: list[tuple[Tensor, ...]]) -> None:
    """shared [S0,H] and (centre, A, B) of gate, up and down, into the FFN's holders."""
    parts = list(zip(shared, matrices, strict=True))
    groups = [parts[:2], parts[2:]] if len(ffn.names) == 2 else [[part] for part in parts]
    for name, group in zip(ffn.names, groups, strict=True):
        holder = getattr(ffn, name)
        for index, (rows, factors) in enumerate(group):
            holder.shared[index].copy_(rows)
            for parameter, value in zip(("centre", "left", "right"), factors, strict=True):
                getattr(holder, parameter)[index].copy_(value)


def _check(layers: list[DSMoEFFN], rank: int) -> None:
    if any(ffn.experts is not None for ffn in layers):
        raise ValueError("quantized experts cannot be compressed")
    if any(ffn.is_factored for ffn in layers):
        raise ValueError("the experts are compressed already")
    if any(len(set(ffn.sizes[ffn.num_shared :])) > 1 for ffn in layers):
        raise ValueError("only experts of one size have a centre")
    ffn = layers[0]
    size = ffn.sizes[-1]
    if not 1 <= rank <= size:
        raise ValueError(f"rank must lie between 1 and the {size} neurons of an expert, got {rank}")
    num_experts, hidden = ffn.num_experts, ffn.hidden_size
    after = size * hidden + num_experts * rank * (size + hidden)
    if after >= num_experts * size * hidden:
        most = (num_experts - 1) * size * hidden / (num_experts * (size + hidden))
        raise ValueError(
            f"rank {rank} would take more room than the {num_experts} experts of {size} "
            f"themselves: at most {int(most)} saves some"
        )

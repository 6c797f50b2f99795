"""Dropping the experts that a task does not use (UNCURL, arXiv 2409.01483).

    use_e = the share of the task's tokens that use expert e

Of every layer the experts used least are dropped: their neurons and their rows of the router. The
dense dimension I shrinks with them, so the result is a smaller model of the same class.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dsmoe_ext.convert import sharing_copy
from dsmoe_ext.ffn import DSMoEFFN
from dsmoe_ext.layers import ffn_layers
from dsmoe_ext.models.adopt import connect_parts, text_model
from dsmoe_ext.models.options import options_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def expert_use(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """By layer, the share of the tokens ids [N,L] that used each routed expert: float64 [R]."""
    from dsmoe_ext.distributed.load import used_experts

    return [used.double().mean(0) for used in used_experts(model, ids)]


@torch.no_grad()
def prune(model: "PreTrainedModel", use: list[Tensor], keep: float) -> "PreTrainedModel":
    """A smaller model that keeps, in every layer, the share `keep` of the routed experts used most.

    model: a sparse model whose routed experts have one size, behind linear routers. use: by layer
    [R], as `expert_use` measures it. Shared experts stay; all but the FFNs is shared with model.
    """
    layers = ffn_layers(model)
    sizes = layers[0].sizes[layers[0].num_shared :]
    num_kept = round(keep * len(sizes))
    if not 1 <= num_kept <= len(sizes):
        raise ValueError(f"keep={keep} of {len(sizes)} experts leaves {num_kept}")
    if any(len(set(ffn.sizes[ffn.num_shared :])) > 1 for ffn in layers):
        raise ValueError("only experts of one size can be pruned: layers must stay alike")
    if any(ffn.experts is not None or ffn.is_factored for ffn in layers):
        raise ValueError("quantized or compressed experts cannot be pruned: prune first")
    if any(not getattr(ffn.router, "has_plain_logits", False) for ffn in layers):
        raise ValueError("only linear routers can be pruned row by row")
    for ffn in layers:
        ffn.refuse_adapters()
    router = layers[0].router
    if router.rule == "top_k" and router.top_k > num_kept:
        raise ValueError(f"top_k={router.top_k} needs that many experts, {num_kept} are kept")
    pruned = sharing_copy(model)
    for ffn, shares in zip(ffn_layers(pruned), use, strict=True):
        kept = shares.argsort(descending=True, stable=True)[:num_kept].sort().values
        _keep(ffn, kept)
    config = text_model(pruned).config
    config.intermediate_size = ffn_layers(pruned)[0].intermediate_size
    options = options_of(pruned)
    options["num_experts"] = num_kept
    options["expert_sizes"] = [sizes[0]] * num_kept if options["expert_sizes"] else None
    connect_parts(pruned, config)
    return pruned


def _keep(ffn: DSMoEFFN, kept: Tensor) -> None:
    """Keeps the routed experts `kept`, ascending, of an FFN, in place."""
    offsets = ffn.expert_offsets.tolist()
    experts = [*range(ffn.num_shared), *(kept + ffn.num_shared).tolist()]
    rows = torch.cat([torch.arange(offsets[e], offsets[e + 1]) for e in experts])
    height = ffn.intermediate_size
    for index, name in enumerate(ffn.names):
        holder, weight = getattr(ffn, name), getattr(ffn, name).weight
        if index == len(ffn.names) - 1:
            part = weight[:, rows]
        elif len(weight) == 2 * height:  # gate and up in one
            part = weight[torch.cat([rows, rows + height])]
        else:
            part = weight[rows]
        holder.weight = nn.Parameter(part.clone(), weight.requires_grad)
    router = ffn.router
    router.weight = nn.Parameter(router.weight[kept].clone())
    if router.bias is not None:
        router.bias = nn.Parameter(router.bias[kept].clone())
    ffn.sizes = [ffn.sizes[e] for e in experts]
    router.num_experts, router.expert_sizes, router._offsets = len(kept), ffn.sizes, None
    ffn.num_experts, ffn.intermediate_size = len(kept), len(rows)
    ffn.permutation = torch.arange(len(rows), device=ffn.permutation.device)
    ffn.activity = type(ffn.activity)(len(ffn.sizes), ffn.permutation.device)
    ffn._offsets = ffn._packed = None

"""Oracles: the dense model with only those neurons on that matter for each token.

They need every neuron's activation first, so they save nothing: they bound what a router can reach.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from ..calibration.neurons import Layout, expert_norms, experts_of_neurons, switch_off
from ..gated_mlp import kind_of, mlp_activations
from ..layers import ffn_layers
from ..models.adopt import gated_mlps, text_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def masked_ffns(
    dense: "PreTrainedModel", masks: list[Callable[[Tensor, Tensor], None]]
) -> Iterator[None]:
    """Runs every gated MLP of a dense model as down(masked a). masks[l](a [T,I], ‖d‖ [I]) works in
    place.

    The model is as before afterwards.
    """
    layers = list(gated_mlps(text_model(dense)).values())

    def sparse(
        mlp: nn.Module, mask: Callable[[Tensor, Tensor], None]
    ) -> Callable[[Tensor], Tensor]:
        found = kind_of(mlp)
        weights = found.weights(mlp)
        strength = weights[-1].float().norm(dim=0)

        def forward(x: Tensor) -> Tensor:
            hidden = mlp_activations(x.flatten(0, -2), weights, found.activation)
            mask(hidden, strength.to(hidden.dtype))
            return F.linear(hidden, weights[-1].to(hidden.dtype)).view(x.shape)

        return forward

    try:
        for mlp, mask in zip(layers, masks, strict=True):
            mlp.forward = sparse(mlp, mask)
        yield
    finally:
        for mlp in layers:
            mlp.__dict__.pop("forward", None)


def strongest_neurons(share: float) -> Callable[[Tensor, Tensor], None]:
    """Leaves on, for every token, the share of the neurons that contribute most."""

    def mask(hidden: Tensor, strength: Tensor) -> None:
        contribution = hidden.abs() * strength
        off = hidden.shape[1] - round(share * hidden.shape[1])
        weak = contribution.topk(off, dim=1, largest=False, sorted=False).indices
        hidden.scatter_(1, weak, 0.0)

    return mask


def strongest_experts(
    sparse: "PreTrainedModel", target_active: float
) -> list[Callable[[Tensor, Tensor], None]]:
    """For every layer of a calibrated model: its experts, chosen by their true strength.

    One threshold for all tokens of a batch leaves target_active on, as calibration does.
    """
    masks = []
    for ffn in ffn_layers(sparse):
        sizes = ffn.expert_offsets.diff()[ffn.num_shared :].tolist()
        layout = Layout(ffn.shared_size, sizes)
        experts = experts_of_neurons(ffn.permutation, layout)
        masks.append(_by_true_strength(experts, layout, layout.routed_share(target_active)))
    return masks


def _by_true_strength(
    experts: Tensor, layout: Layout, share: float
) -> Callable[[Tensor, Tensor], None]:
    def mask(hidden: Tensor, strength: Tensor) -> None:
        norms = expert_norms(hidden, strength, experts, layout).float()
        rank = min(max(round((1 - share) * norms.numel()), 1), norms.numel())
        threshold = norms.flatten().kthvalue(rank).values
        switch_off(hidden, norms > threshold, experts)

    return mask

"""Oracles: the dense model with only those neurons on that matter for each token.

They need every neuron's activation first, so they save nothing: they bound what a router can reach.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from ..calibration.dense_ffn import DenseFFN
from ..calibration.neurons import Layout, expert_norms, experts_of_neurons, switch_off
from ..layers import ffn_layers
from .replaced import replaced_ffns

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def masked_ffns(
    dense: "PreTrainedModel", masks: list[Callable[[Tensor, Tensor], None]]
) -> Iterator[None]:
    """Runs every gated MLP of a dense model as down(masked a). masks[l](a [T,I], ‖d‖ [I]) works in
    place.
    """

    def output(mask: Callable[[Tensor, Tensor], None], ffn: DenseFFN, x: Tensor) -> Tensor:
        hidden = ffn.activate(x)
        mask(hidden, ffn.strength.to(hidden.dtype))
        return ffn.output(hidden)

    with replaced_ffns(dense, [functools.partial(output, mask) for mask in masks]):
        yield


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

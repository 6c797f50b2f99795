"""Which experts are on: one class for each router that calibration knows in closed form.

    threshold    predicted log norm above t, a quantile over the text            (DSMoE)
    top_k        the k largest predicted log norms; k/R is the wanted share      (LLaMA-MoE)
    top_p        p = softmax(2 · predicted log norm): the experts' shares of the output's energy;
                 the largest up to the mass t, a quantile over the text          (XMoE)
    mean_score   the k largest mean gate activations: nothing is fitted          (EMoE)

The first three predict by the same ridge regression (router.py).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsmoe_ext.calibration.neurons import Layout
from dsmoe_ext.calibration.router import SCALE, Strength, count_strength, strength_histogram
from dsmoe_ext.calibration.sums import Histogram, Moments
from dsmoe_ext.reference import active_mask

if TYPE_CHECKING:
    from dsmoe_ext.ffn import DSMoEFFN

METHODS = ("threshold", "top_k", "top_p", "mean_score")
ENERGY = 2.0  # log of a square


@dataclass(frozen=True)
class Choice:
    """A layer's router. strength: what it compares, [T,R] of x [T,H]."""

    method: str
    strength: Strength
    threshold: float = 0.5  # of "top_p"
    top_k: int = 1

    def active(self, x: Tensor) -> Tensor:
        """bool [T,R] of x [T,H]."""
        strength = self.strength.of(x)
        if self.method == "threshold":
            return strength > 0
        rule = "top_p" if self.method == "top_p" else "top_k"
        return active_mask(strength, torch.tensor(self.threshold), rule, self.top_k)

    @torch.no_grad()
    def give_to(self, ffn: "DSMoEFFN") -> None:
        """Fills the router of a DSMoEFFN that was made for this method."""
        if self.method == "mean_score":
            return
        scale = 1.0 if self.method == "top_p" else SCALE
        ffn.router.weight.copy_(scale * self.strength.weight)
        ffn.router.bias.copy_(scale * self.strength.bias)
        if self.method == "top_p":
            ffn.set_threshold(self.threshold)


def options_of_method(method: str, layout: Layout, target: float) -> dict[str, Any]:
    """What sparsify is told for routers of this kind."""
    if method == "threshold":
        return {"target_active": target}
    options = {"method": method, "router_bias": None if method == "mean_score" else True}
    if method == "top_p":
        return options | {"threshold": 1.0}
    return options | {"top_k": num_chosen(layout, target)}


def num_chosen(layout: Layout, target: float) -> int:
    """k of the target: at least one of the R routed experts."""
    return max(1, round(layout.routed_share(target) * len(layout.expert_sizes)))


def choose(
    method: str,
    predicted: Strength,
    logs: Moments,
    inputs: Callable[[], Iterable[Tensor]],
    layout: Layout,
    target: float,
) -> Choice:
    """The router of a layer from its predicted log norms, so that the target is met on the text.

    logs: the sums of the regression. inputs(): the FFN's inputs x [t,H], chunk after chunk.
    """
    if method == "top_k":
        return Choice(method, predicted, top_k=num_chosen(layout, target))
    if method == "top_p":
        energy = Strength(ENERGY * predicted.weight, ENERGY * predicted.bias)
        # An expert is on while the mass ranked before it is below t: the least are on first.
        masses = Histogram(-1.0, 0.0, energy.bias.device)
        for x in inputs():
            ranked, experts = energy.of(x).softmax(1).sort(dim=1, descending=True)
            before = ranked - ranked.cumsum(1)
            count_strength(masses, before.scatter(1, experts, before), layout.expert_sizes)
        share = layout.routed_share(target)
        return Choice(method, energy, min(max(-masses.value_above_which(share), 0.0), 1.0))
    histogram = strength_histogram(predicted, logs)
    for x in inputs():
        count_strength(histogram, predicted.of(x), layout.expert_sizes)
    bias = predicted.bias - histogram.value_above_which(layout.routed_share(target))
    return Choice(method, Strength(predicted.weight, bias))


def by_mean_gate(gate_proj: Tensor, experts: Tensor, layout: Layout, target: float) -> Choice:
    """EMoE's router: the mean of each expert's rows of gate_proj [I,H] is its key.

    experts int64 [I]: the routed expert of every neuron, R for shared ones.
    """
    num_experts = len(layout.expert_sizes)
    rows = gate_proj.float()
    sums = rows.new_zeros(num_experts + 1, rows.shape[1]).index_add_(0, experts, rows)[:-1]
    keys = sums / torch.tensor(layout.expert_sizes, device=rows.device)[:, None]
    nothing = keys.new_zeros(num_experts).to(gate_proj.dtype)
    strength = Strength(keys.to(gate_proj.dtype), nothing)
    return Choice("mean_score", strength, top_k=num_chosen(layout, target))

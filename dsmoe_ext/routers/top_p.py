"""XMoE: as many experts as it takes to gather a share of the probability."""

import math

import torch
from torch import Tensor

from dsmoe_ext.ops import Routing
from dsmoe_ext.routers.interface import register
from dsmoe_ext.routers.linear import LinearRouter

MIN_CAPACITY = 4  # as in the paper's code


@register("top_p")
class TopPRouter(LinearRouter):
    """p = softmax(x W), active while the mass ranked before is below t, G = p      arXiv 2403.18926

    t = 0 is top-1, t = 1 every expert. Equal logits rank by index. p is not renormalised.
    capacity_factor: at most max(4, ceil(T/R · factor)) tokens an expert, see `within_capacity`; the
    others skip it. None (the default) drops nothing.
    """

    rule = "top_p"
    knob = "threshold"
    balance_form = "switch"
    defaults = LinearRouter.defaults | dict(threshold=0.9, capacity_factor=None)

    @property
    def is_plain(self) -> bool:
        is_rule = type(self).pick is TopPRouter.pick and self.options["capacity_factor"] is None
        return self.has_plain_logits and is_rule

    def pick(self, logits: Tensor, threshold: Tensor | None = None) -> Routing:
        gates, scores = super().pick(logits, threshold)
        factor = self.options["capacity_factor"]
        if factor is not None:
            capacity = max(MIN_CAPACITY, math.ceil(len(scores) / self.num_experts * factor))
            active = gates[:, self.num_shared :] != 0
            kept = within_capacity(scores, active, capacity)
            shared = kept.new_ones(len(kept), self.num_shared)
            gates = gates * torch.cat([shared, kept], dim=1)
        return Routing(gates, scores)


def within_capacity(scores: Tensor, active: Tensor, capacity: int) -> Tensor:
    """The active pairs that find a place, bool [T,R]: every expert has `capacity` of them.

    First come the tokens that rank the expert highest among theirs, of equal ranks those with the
    higher score, then the earlier ones.
    """
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    order = scores.argsort(dim=0, descending=True, stable=True)
    order = order.gather(0, ranks.gather(0, order).argsort(dim=0, stable=True))
    waiting = active.gather(0, order)
    kept = waiting & (waiting.cumsum(0) <= capacity)
    return torch.zeros_like(active).scatter(0, order, kept)

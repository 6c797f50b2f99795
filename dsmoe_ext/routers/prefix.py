"""MatFormer: nested FFNs, the smaller ones being the first slices of the larger."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsmoe_ext.ops import Routing
from dsmoe_ext.routers.interface import Router, float_of, register
from dsmoe_ext.sampling import mix_key


@register("prefix")
class PrefixRouter(Router):
    """The first `active` routed experts for every token, gates 1           arXiv 2310.07707

    With sizes I/8, I/8, I/4, I/2 (layout "nested") these are the paper's FFNs of I/8 to I. In
    training one of them is drawn every optimiser step, the same in all layers (`start_step`;
    without it all experts are on). In evaluation `active`, a buffer, decides, layer by layer:
    different numbers are the paper's Mix'n'Match.

    active: at the start; None: all. seed: of the draws.
    """

    knob = "active"
    defaults = dict(active=None, seed=0)  # noqa: RUF012

    def __init__(
        self,
        hidden_size: int,
        expert_sizes: Sequence[int],
        num_shared: int = 0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **opts: Any,
    ):
        super().__init__(hidden_size, expert_sizes, num_shared, **opts)
        active = self.options["active"]
        active = self.num_experts if active is None else active
        if not 0 <= active <= self.num_experts:
            raise ValueError(f"active must lie between 0 and {self.num_experts}, got {active}")
        self.register_buffer("active", torch.tensor(active, device=device))
        self.drawn = self.num_experts

    def start_step(self, step: int) -> None:
        key = mix_key(self.options["seed"], step) % 2**64
        self.drawn = 1 + (key * self.num_experts >> 64)  # uniform, the same for every layer

    def forward(self, x: Tensor, gate_proj: Tensor | None = None) -> Tensor:
        active: Any = self.drawn if self.training else self.active
        mask = torch.arange(self.num_experts, device=x.device) < active
        return mask.to(float_of(x)).expand(len(x), -1)

    def pick(self, logits: Tensor, threshold: Tensor | None = None) -> Routing:
        return self.routing(logits, logits > 0)

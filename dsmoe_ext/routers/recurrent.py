"""RMoE: routers that remember what the layers before decided."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsmoe_ext.routers.interface import Router, register
from dsmoe_ext.routers.linear import LinearRouter


@register("recurrent")
class RecurrentRouter(LinearRouter):
    """h_l = GRU(Proj_l(x_l), h_{l-1}), logits = h_l W_l, top-k softmax     arXiv 2408.06793

    h is `state_size` wide; the GRU belongs to the first layer and serves all (`join`). A state
    lives for one pass through the layers, so decoding needs no cache for it. Layers run in order,
    on the same tokens; gradient checkpointing must be the non-reentrant one.
    """

    rule = "top_k"
    knob = "top_k"
    balance_form = "switch"
    defaults = LinearRouter.defaults | dict(state_size=128)

    gru: nn.GRUCell | None
    first: "RecurrentRouter"

    def make_weights(self, width: int, **kind: Any) -> None:
        size = self.options["state_size"]
        self.project_weight = nn.Parameter(torch.empty(size, width, **kind))
        self.project_bias = nn.Parameter(torch.empty(size, **kind))
        self.gru = nn.GRUCell(size, size, **kind)
        self.states: dict[int, Tensor] = {}  # by layer; the first layer's serves all
        self.join(0, self)
        super().make_weights(size, **kind)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.project_weight, std=0.02)
        nn.init.zeros_(self.project_bias)

    def join(self, layer: int, first: Router) -> None:
        self.layer = layer
        self.__dict__["first"] = first  # not as a submodule: its parameters are saved once
        if first is not self:
            self.gru = None

    def forward(self, x: Tensor, gate_proj: Tensor | None = None) -> Tensor:
        states = self.first.states
        if self.layer == 0:
            before = None
        elif self.layer - 1 not in states or len(states[self.layer - 1]) != len(x):
            raise RuntimeError(
                f"router {self.layer} has no state of layer {self.layer - 1} for these {len(x)} "
                "tokens: recurrent routers run layer after layer, from the first one on"
            )
        else:
            before = states[self.layer - 1]
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.project_weight, self.project_bias
            gru = self.first.gru
            assert gru is not None
            states[self.layer] = gru(F.linear(x.to(weight.dtype), weight, bias), before)
            return self.logits(states[self.layer])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "states": {}}

"""EMoE: experts of a dense FFN picked by the mean of their own gate activations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from dsmoe_ext.ops import Routing
from dsmoe_ext.routers.interface import float_of, register
from dsmoe_ext.routers.linear import LinearRouter


@register("mean_score")
class MeanScoreRouter(LinearRouter):
    """Logit of e = mean over its neurons of x·Wgate; the k largest are on, G = 1   arXiv 2310.10908

    Nothing is trained and no gradient passes through the choice. The keys, one row an expert, are
    means of gate_proj's rows. Training and moves drop them, evaluation keeps them from its first
    forward on; after other changes of gate_proj in evaluation call `forget`.
    """

    rule = "top_k"
    knob = "top_k"
    needs_gate_proj = True
    defaults = LinearRouter.defaults | dict(gates="binary")

    def make_weights(self, width: int, **kind: Any) -> None:
        self._keys: Tensor | None = None

    def start_dense(self) -> None:
        """Nothing: the choice is the weights' own."""

    def reset_parameters(self) -> None:
        self.forget()

    def forward(self, x: Tensor, gate_proj: Tensor | None = None) -> Tensor:
        if self.training or torch.is_grad_enabled() or self._keys is None:
            if gate_proj is None:
                raise ValueError("mean_score routes by the FFN's gate_proj: pass it")
            self._keys = self.keys_of(gate_proj)
        keys = self._keys
        if torch.is_grad_enabled():
            self._keys = None  # holds a graph; and the next step changes the weights
        dtype = torch.promote_types(float_of(x), keys.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return x.to(dtype) @ keys.to(dtype).T

    def pick(self, logits: Tensor, threshold: Tensor | None = None) -> Routing:
        gates, scores = super().pick(logits)
        return Routing(gates.detach(), scores)

    def keys_of(self, gate_proj: Tensor) -> Tensor:
        """[R,H]: each routed expert's mean row of gate_proj [I,H]."""
        sizes = self.offsets(gate_proj.device).diff()
        rows = gate_proj.to(float_of(gate_proj))
        means = torch.segment_reduce(rows, "mean", lengths=sizes.long(), axis=0, unsafe=True)
        return means[self.num_shared :]

    def forget(self) -> None:
        """Drops the keys, to be computed anew."""
        self._keys = None

    def train(self, mode: bool = True) -> Self:
        self.forget()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.forget()
        return super()._apply(fn, recurse)

"""The classical router: every token uses its k best experts."""

from torch import Tensor

from dsmoe_ext.ops import Routing
from dsmoe_ext.routers.interface import register
from dsmoe_ext.routers.linear import LinearRouter


@register("top_k")
class TopKRouter(LinearRouter):
    """The k largest logits, ties by index; G = softmax        LLaMA-MoE, arXiv 2406.16554

    renormalize=True   softmax over the kept logits, which is the softmax over all, renormalised
    renormalize=False  softmax over all logits as it is
    rescale=True       times E/k (I_routed / active neurons where sizes differ), as LLaMA-MoE does
    """

    rule = "top_k"
    knob = "top_k"
    balance_form = "cv"
    defaults = LinearRouter.defaults | dict(renormalize=True)

    @property
    def is_plain(self) -> bool:
        return self.has_plain_logits and type(self).pick is TopKRouter.pick and self.is_rule

    @property
    def is_rule(self) -> bool:
        """Whether the gates are those of `ops.route`."""
        return self.options["renormalize"] or self.options["gates"] == "binary"

    def pick(self, logits: Tensor, threshold: Tensor | None = None) -> Routing:
        gates, scores = super().pick(logits)
        if self.is_rule:
            return Routing(gates, scores)
        active = gates[:, self.num_shared :].detach() != 0
        return self.routing(scores, active, scores * self.factor(active.to(scores)))

    def factor(self, active: Tensor) -> Tensor | float:
        """gate_scale, with rescale times I_routed / active neurons [T,1]; active [T,R]: 0 or 1."""
        scale = self.gate_scale
        if not self.options["rescale"]:
            return scale
        sizes = self.offsets(active.device).diff()[self.num_shared :].to(active)
        return scale * sizes.sum() / (active * sizes).sum(1, keepdim=True)

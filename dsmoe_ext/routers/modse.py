"""MoDSE: top-k over logits with learned noise, for experts of different sizes."""

from dsmoe_ext.routers.interface import register
from dsmoe_ext.routers.linear import NoisyRouter
from dsmoe_ext.routers.scored import ScoredRouter


@register("modse")
class MoDSERouter(ScoredRouter):
    """H(x) = x Wg + RMSNorm(softplus(x Wn)), G = softmax(keep_top_k(H(x)))   arXiv 2409.12210

    The paper writes no Gaussian factor, so nothing is drawn; the norm has a learned gain.
    """

    rule = "top_k"
    knob = "top_k"
    balance_form = "switch"

    def make_logits(self, device, dtype):
        size = (self.hidden_size, self.num_experts, self.options["bias"])
        return NoisyRouter(*size, device=device, dtype=dtype)

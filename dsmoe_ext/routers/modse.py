"""MoDSE: top-k over logits with learned noise, for experts of different sizes."""

from dsmoe_ext.routers.interface import register
from dsmoe_ext.routers.linear import LinearRouter


@register("modse")
class MoDSERouter(LinearRouter):
    """H(x) = x Wg + RMSNorm(softplus(x Wn)), G = softmax(keep_top_k(H(x)))   arXiv 2409.12210

    The paper writes no Gaussian factor, so nothing is drawn; the norm has a learned gain.
    """

    rule = "top_k"
    knob = "top_k"
    balance_form = "switch"
    defaults = LinearRouter.defaults | dict(noise=True)

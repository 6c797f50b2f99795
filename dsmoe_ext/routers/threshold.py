"""DSMoE: every expert whose sigmoid exceeds tau."""

from dsmoe_ext.routers.interface import register
from dsmoe_ext.routers.linear import LinearRouter


@register("threshold")
class ThresholdRouter(LinearRouter):
    """s = sigmoid(x Y), active iff s > tau, G = (E/k) s        arXiv 2502.12455, section 3

    tau = 0 keeps every expert but those whose sigmoid underflows, tau = 1 none: the FFN then adds
    nothing. A NaN logit is active, so that it shows.
    """

    rule = "threshold"
    knob = "threshold"
    defaults = LinearRouter.defaults | dict(rescale=True)

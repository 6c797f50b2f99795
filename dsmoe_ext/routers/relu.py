"""ReMoE: an expert is on where its logit is positive."""

from dsmoe_ext.routers.interface import register
from dsmoe_ext.routers.linear import LinearRouter


@register("relu")
class ReluRouter(LinearRouter):
    """G = R = relu(x W), active iff R > 0; differentiable, no estimator     arXiv 2412.14711

    Training adds the L1 of R, weighted by each expert's load (balance form "load_l1"), times a
    lambda that `LambdaController` steers to the wanted active share.
    """

    rule = "relu"
    balance_form = "load_l1"

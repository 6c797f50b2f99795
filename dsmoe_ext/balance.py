"""Losses that keep experts evenly used (formulas: XMoE, MoDSE, LLaMA-MoE, ReMoE)."""

import torch
from torch import Tensor

from dsmoe_ext.ops import Routing

BALANCE_FORMS = ("switch", "cv", "load_l1")


def balance_loss(
    routing: Routing,
    *,
    form: str = "switch",
    token_mask: Tensor | None = None,
    num_active: float | None = None,
) -> Tensor:
    """How unevenly tokens spread over one layer's routed experts; 0-d, to be scaled by about 0.01.

    "switch"   R · sum_e mean_t(s_e) · mean_t(1[argmax_t = e])    Switch, XMoE, MoDSE; 1 when even
    "cv"       CV²(importance) + CV²(load)                        LLaMA-MoE; 0 when even
               importance = sum_t of the gates; load = number of tokens that use the expert,
               through which the scores' gradient passes straight
    "load_l1"  mean_t sum_e f_e s_e,  f_e = R/k · mean_t(1[s_e > 0])      ReMoE, arXiv 2412.14711
               k = num_active, the experts that a token shall use; None: those that it does use.
               Scaled by a lambda that `LambdaController` steers, not by 0.01

    routing: gates [T,E], scores [T,R]. token_mask [T] (bool): the tokens that count.
    """
    if form not in BALANCE_FORMS:
        raise ValueError(f"form must be one of {', '.join(BALANCE_FORMS)}; got {form!r}")
    gates, scores = routing
    gates = gates[:, gates.shape[1] - scores.shape[1] :]
    if token_mask is not None:
        gates, scores = gates[token_mask], scores[token_mask]
    if len(scores) == 0:
        return scores.sum()
    if form == "switch":
        first = torch.zeros_like(scores).scatter(1, scores.argmax(1, keepdim=True), 1.0)
        return scores.shape[1] * (scores.mean(0) * first.mean(0)).sum()
    used = (gates != 0).to(scores)
    if form == "load_l1":
        share = used.mean(0)
        wanted = share.mean() if num_active is None else num_active / scores.shape[1]
        weight = share / torch.as_tensor(wanted, device=share.device).clamp(min=1e-10)
        return (scores * weight).sum(1).mean()
    load = used + scores - scores.detach()
    return _cv_squared(gates.sum(0)) + _cv_squared(load.sum(0))


def _cv_squared(values: Tensor) -> Tensor:
    return values.var(unbiased=False) / values.mean().square().clamp(min=1e-10)

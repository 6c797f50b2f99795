"""Losses that keep experts evenly used (formulas: XMoE, MoDSE, LLaMA-MoE, ReMoE)."""

import torch
from torch import Tensor

from dsmoe_ext.ops import Routing

BALANCE_FORMS = ("switch", "cv", "load_l1")


def balance_terms(
    routing: Routing,
    form: str = "switch",
    *,
    token_mask: Tensor | None = None,
    num_active: float | None = None,
) -> Tensor:
    """One layer's balance loss as terms [T] of its tokens: their mean is `balance_loss`, in value
    and gradient. What is taken over all tokens (loads, CV²'s slopes) is a constant in each term.

    The terms of tokens that token_mask leaves out are 0.
    """
    if form not in BALANCE_FORMS:
        raise ValueError(f"form must be one of {', '.join(BALANCE_FORMS)}; got {form!r}")
    gates, scores = routing
    num_tokens, num_experts = scores.shape
    gates = gates[:, gates.shape[1] - num_experts :]
    counted: Tensor | None = None
    count: Tensor | int = max(num_tokens, 1)
    if token_mask is not None:
        counted = token_mask.to(scores)[:, None]
        count = counted.sum().clamp(min=1)

    def per_expert(values: Tensor) -> Tensor:
        """Sums over the tokens that count, constants for the gradient. where, not a product: what
        padding computes, even NaN, must not reach the sum."""
        values = values.detach()
        return (values if counted is None else torch.where(counted > 0, values, 0.0)).sum(0)

    used = (gates != 0).to(scores)
    if form == "switch":
        first = torch.zeros_like(scores).scatter(1, scores.argmax(1, keepdim=True), 1.0)
        terms = num_experts * (scores * (per_expert(first) / count)).sum(1)
    elif form == "load_l1":
        share = per_expert(used) / count
        wanted = share.mean() if num_active is None else share.new_tensor(num_active / num_experts)
        terms = (scores * (share / wanted.clamp(min=1e-10))).sum(1)
    else:
        terms = scores.new_zeros(num_tokens)
        for values, total in ((gates, per_expert(gates)), (scores, per_expert(used))):
            cv, slope = _cv_squared(total)
            terms = terms + cv + count * ((values - values.detach()) * slope).sum(1)
    return terms if token_mask is None else torch.where(token_mask, terms, 0.0)


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
    terms = balance_terms(routing, form, token_mask=token_mask, num_active=num_active)
    if token_mask is None:
        return terms.mean() if len(terms) else terms.sum()
    return terms.sum() / token_mask.sum().clamp(min=1)


def _cv_squared(totals: Tensor) -> tuple[Tensor, Tensor]:
    """Squared coefficient of variation of totals [R], and its slope [R]."""
    mean = totals.mean()
    safe = mean.square().clamp(min=1e-10)
    cv = totals.var(unbiased=False) / safe
    slope = 2 / len(totals) * ((totals - mean) / safe - cv * mean / safe)
    return cv, slope

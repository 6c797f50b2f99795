"""Balance losses against their formulas, values and gradients."""

import pytest
import torch

from dsmoe_ext.balance import BALANCE_FORMS, balance_loss
from dsmoe_ext.ops import Routing, route

pytestmark = pytest.mark.quick
OFFSETS = torch.arange(0, 20, 4).int()


def random_routing(method="top_k"):
    """(routing, logits) of 50 tokens and 4 experts of which a token uses 2, or about 2."""
    logits = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    return route(logits, 0.0, OFFSETS, method=method, top_k=2, rescale=False), logits


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits, retain_graph=True)[0]


def test_switch(seed):
    """Against XMoE's written with loops: R sum_e P_e f_e."""
    routing, logits = random_routing()
    p = logits.softmax(1)
    want = 0
    for e in range(4):
        first = sum(float(max(range(4), key=lambda i: row[i]) == e) for row in p.tolist()) / 50
        want = want + 4 * p[:, e].mean() * first
    torch.testing.assert_close(balance_loss(routing), want)
    torch.testing.assert_close(gradient(balance_loss(routing), logits), gradient(want, logits))


def test_cv(seed):
    """LLaMA-MoE's: CV² of the summed gates and of the loads; the load's gradient is the scores'."""
    routing, logits = random_routing()
    got = balance_loss(routing, form="cv")
    importance, load = routing.gates.sum(0), (routing.gates != 0).double().sum(0)
    want = sum(v.var(unbiased=False) / v.mean() ** 2 for v in (importance, load))
    torch.testing.assert_close(got, want)
    scores = logits.softmax(1).sum(0)
    slopes = torch.autograd.functional.jacobian(
        lambda v: v.var(unbiased=False) / v.mean() ** 2, load
    )
    through_load = gradient((slopes * scores).sum(), logits)
    top = logits.topk(2, 1)
    sums = torch.zeros_like(logits).scatter(1, top.indices, top.values.softmax(1)).sum(0)
    through_sums = gradient(sums.var(unbiased=False) / sums.mean() ** 2, logits)
    torch.testing.assert_close(gradient(got, logits), through_load + through_sums)


@pytest.mark.parametrize("num_active", [None, 1.5])
def test_load_l1(num_active, seed):
    """ReMoE's: every expert's L1 weighted by its load, which is a constant for the gradient."""
    routing, logits = random_routing("relu")
    scores = logits.relu()
    share = (scores > 0).double().mean(0)
    k = share.sum() if num_active is None else num_active
    want = sum((4 * share[e] / k) * scores[:, e].mean() for e in range(4))
    got = balance_loss(routing, form="load_l1", num_active=num_active)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient(got, logits), gradient(want, logits))


def test_even_use_and_masks(seed):
    even = Routing(torch.ones(8, 4), torch.eye(4).repeat(2, 1))
    assert balance_loss(even) == 1 and balance_loss(even, form="cv") == 0
    routing, _ = random_routing()
    mask = torch.arange(50) < 20
    part = Routing(routing.gates[mask], routing.scores[mask])
    for form in BALANCE_FORMS:
        masked = balance_loss(routing, form=form, token_mask=mask)
        torch.testing.assert_close(masked, balance_loss(part, form=form))
        nothing = balance_loss(routing, form=form, token_mask=torch.zeros(50, dtype=torch.bool))
        assert nothing == 0
        routing.scores.data[~mask] = float("nan")  # what padding computes does not matter
        assert torch.equal(balance_loss(routing, form=form, token_mask=mask), masked)
        routing, _ = random_routing()
        part = Routing(routing.gates[mask], routing.scores[mask])
    with pytest.raises(ValueError, match="switch, cv, load_l1"):
        balance_loss(routing, form="z")

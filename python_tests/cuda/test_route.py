"""route.cu, forward and backward, against dsmoe_ext.reference in float64, on given logits."""

import pytest
import torch
from ops_under_test import ON_GPU, Ops

from dsmoe_ext import reference
from dsmoe_ext.testing import offsets_of

OPTIONS = [
    dict(method=method, gates=gates, rescale=rescale, top_k=3, gate_scale=scale)
    for method in reference.METHODS
    for gates in reference.GATES
    for rescale, scale in ((True, 1.0), (False, 1.25))
]
SHAPES = {  # name: (T, sizes, shared experts)
    "no token": (0, [4, 4, 4], 0),
    "one token": (1, [5, 1, 7, 3], 0),
    "equal": (33, [8] * 8, 0),
    "unequal, shared": (20, [40, 1, 7, 3, 16], 1),
    "two shared": (17, [40, 20, 7, 3, 16], 2),
    "empty expert": (9, [4, 0, 4, 4], 0),
    "off the warp": (9, [4] * 33, 0),
    "many": (2, [2] * 130, 0),
}


def name(options):
    return "-".join(str(v) for v in options.values())


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, options):
    check(*SHAPES[shape], options)


@pytest.mark.parametrize("method", reference.METHODS)
def test_600_experts(method):
    check(1, [2] * 600, 0, dict(method=method, top_k=100))


def check(num_tokens, sizes, num_shared, options, ops=None):
    offsets, num_routed = offsets_of(sizes), len(sizes) - num_shared
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(num_tokens, num_routed, generator=g) * 2).float()
    exact = logits.double().requires_grad_()
    threshold, eps = 0.6, torch.finfo(torch.float32).eps
    ops = ops or Ops()
    gates, scores = ops.route(logits, threshold, offsets, **options)
    want = reference.route(exact, torch.tensor(threshold), offsets, **options)
    assert torch.equal(gates != 0, want[0] != 0)
    for result, wanted in zip((gates, scores), want, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=32 * eps, atol=32 * eps)

    dgates, dscores = (torch.randn(t.shape, generator=g) for t in want)
    for with_scores in (True, False):
        ours = ops.route_backward(
            dgates, dscores if with_scores else None, gates, scores, offsets, **options
        )
        total = (want[0] * dgates).sum() + (want[1] * dscores).sum() * with_scores
        (wanted,) = torch.autograd.grad(total, exact, retain_graph=True)
        bound = 256 * eps * max(1, num_routed)
        torch.testing.assert_close(ours.double(), wanted, rtol=bound, atol=bound)


def test_dsmoe_by_hand():
    # sigmoid(0) = 0.5 is not above 0.5 (strict); sigmoid(log 3) = 0.75; E/k = 3/1
    logits = torch.tensor([[0.0, 3.0, 1 / 3]]).log()
    gates, scores = Ops().route(logits, 0.5, offsets_of([2, 2, 2]))
    torch.testing.assert_close(scores, torch.tensor([[0.0, 0.75, 0.25]]))
    torch.testing.assert_close(gates, torch.tensor([[0.0, 2.25, 0.0]]))


@pytest.mark.parametrize("threshold, kept", [(0.0, 1), (0.6, 2), (0.9, 3), (1.0, 4)])
def test_xmoe_keeps_the_expert_that_crosses(threshold, kept):
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]]).log()
    offsets = offsets_of([2] * 4)
    gates, _ = Ops().route(logits, threshold, offsets, method="top_p", rescale=False)
    assert int((gates != 0).sum()) == kept


@pytest.mark.parametrize("method", ["top_k", "top_p"])
def test_ties_go_to_the_lower_index(method):
    logits = torch.zeros(3, 40)
    gates, _ = Ops().route(logits, 0.2, offsets_of([2] * 40), method=method, top_k=8)
    assert torch.equal(gates != 0, (torch.arange(40) < 8).expand(3, 40))


@pytest.mark.parametrize("method", reference.METHODS)
def test_nan_logits_show_in_the_gates(method):
    logits = torch.tensor([[float("nan"), 1.0, -1.0], [2.0, 1.0, -1.0]])
    gates, _ = Ops().route(logits, 0.5, offsets_of([2] * 3), method=method, top_k=1)
    assert gates[0].isnan().any() and not gates[1].isnan().any()


def test_infinite_and_extreme_logits():
    logits = torch.tensor([[float("inf"), float("-inf"), 90.0, -90.0]])
    gates, scores = Ops().route(logits, 0.5, offsets_of([2] * 4), rescale=False)
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    assert torch.equal(gates, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))


@pytest.mark.skipif(ON_GPU, reason="schedules are the interpreter's")
@pytest.mark.parametrize("method", reference.METHODS)
def test_same_bits_under_any_schedule(method):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(30, 40, generator=g)
    options = dict(method=method, top_k=5)
    want = Ops().route(logits, 0.5, offsets_of([3] * 40), **options)
    for seed in range(3):
        got = Ops(seed=seed).route(logits, 0.5, offsets_of([3] * 40), **options)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

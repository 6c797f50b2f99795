"""route against the reference in float64, on given logits (routing is discontinuous)."""

import pytest
import torch

import dsmoe_ext
from dsmoe_ext import reference
from dsmoe_ext.testing import offsets_of

pytestmark = pytest.mark.quick

OPTIONS = [
    dict(method=method, gates=gates, rescale=rescale, top_k=3, gate_scale=scale)
    for method in reference.METHODS
    for gates in reference.GATES
    for rescale, scale in ((True, 1.0), (False, 1.25))
]
SHAPES = {
    "no token": (0, [4, 4, 4], 0),
    "one token": (1, [5, 1, 7, 3], 0),
    "equal": (33, [8] * 8, 0),
    "unequal, shared": (64, [40, 1, 7, 3, 16], 1),
    "two shared": (17, [40, 20, 7, 3, 16], 2),
    "empty expert": (9, [4, 0, 4, 4], 0),
    "many": (70, [2] * 512, 0),
}


def name(options):
    return "-".join(str(v) for v in options.values())


@pytest.mark.parametrize("options", OPTIONS, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matches_reference(shape, options, dtype, seed):
    num_tokens, sizes, num_shared = SHAPES[shape]
    offsets, num_routed = offsets_of(sizes), len(sizes) - num_shared
    logits = torch.randn(num_tokens, num_routed, dtype=torch.float64).mul(2)
    logits = logits.to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    threshold = 0.6
    ours = dsmoe_ext.route(logits, threshold, offsets, **options)
    want = reference.route(exact, torch.tensor(threshold), offsets, **options)
    assert ours.gates.dtype == ours.scores.dtype == dtype
    eps = torch.finfo(dtype).eps
    assert torch.equal(ours.gates != 0, want[0] != 0)
    for result, wanted in zip(ours, want, strict=True):
        torch.testing.assert_close(result.double(), wanted, rtol=32 * eps, atol=32 * eps)
    weights = [torch.randn_like(t) for t in want]

    def gradient(outputs, leaf):
        return torch.autograd.grad(
            sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True)), leaf
        )[0]

    bound = 256 * eps * max(1, num_routed)
    torch.testing.assert_close(
        gradient(ours, logits).double(), gradient(want, exact), rtol=bound, atol=bound
    )


def test_dsmoe_by_hand():
    # sigmoid(0) = 0.5 is not above 0.5 (strict); sigmoid(log 3) = 0.75; E/k = 3/1
    logits = torch.tensor([[0.0, 3.0, 1 / 3]], dtype=torch.float64).log().requires_grad_()
    gates, scores = dsmoe_ext.route(logits, 0.5, offsets_of([2, 2, 2]))
    torch.testing.assert_close(scores, torch.tensor([[0.0, 0.75, 0.25]], dtype=torch.float64))
    torch.testing.assert_close(gates, torch.tensor([[0.0, 2.25, 0.0]], dtype=torch.float64))
    # straight through: the inactive third expert gets sigmoid'(z) * E/k = 3/16 * 3 too
    (gradient,) = torch.autograd.grad(gates.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 9 / 16, 9 / 16]], dtype=torch.float64))


def test_no_active_expert_has_factor_one():
    logits = torch.full((1, 4), -1.0, dtype=torch.float64, requires_grad=True)
    gates, scores = dsmoe_ext.route(logits, 0.5, offsets_of([2] * 4))
    assert torch.equal(gates, torch.zeros_like(gates))
    (gradient,) = torch.autograd.grad(gates.sum(), logits)
    torch.testing.assert_close(gradient, (scores * (1 - scores)).detach())


def test_unequal_sizes_rescale_by_size():
    logits = torch.tensor([[5.0, -5.0, 5.0]], dtype=torch.float64)
    gates, scores = dsmoe_ext.route(logits, 0.5, offsets_of([1, 6, 3]))
    torch.testing.assert_close(gates[0, 0], scores[0, 0] * 10 / 4)


@pytest.mark.parametrize("threshold, kept", [(0.0, 1), (0.6, 2), (0.95, 3), (1.0, 4)])
def test_xmoe_keeps_the_expert_that_crosses(threshold, kept):
    logits = torch.tensor([[0.05, 0.5, 0.15, 0.3]], dtype=torch.float64).log()
    gates, _ = dsmoe_ext.route(
        logits, threshold, offsets_of([2] * 4), method="top_p", rescale=False
    )
    assert int((gates != 0).sum()) == kept


def test_top_p_of_one_keeps_every_expert(seed):
    logits = torch.randn(200, 512) * 4
    gates, scores = dsmoe_ext.route(logits, 1.0, offsets_of([1] * 512), method="top_p")
    assert torch.equal(gates != 0, scores != 0)


def test_no_second_derivative():
    logits = torch.zeros(2, 3, requires_grad=True)
    gates = dsmoe_ext.route(logits, 0.4, offsets_of([2, 2, 2])).gates
    with pytest.raises(RuntimeError, match="route can be differentiated once only"):
        torch.autograd.grad(gates.sum(), logits, create_graph=True)


def test_a_threshold_that_wants_a_gradient():
    offsets = offsets_of([2, 2])
    threshold = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient for its threshold"):
        dsmoe_ext.route(torch.zeros(3, 2), threshold, offsets)
    with torch.no_grad():
        dsmoe_ext.route(torch.zeros(3, 2), threshold, offsets)
    dsmoe_ext.route(torch.zeros(3, 2), threshold.detach(), offsets)


@pytest.mark.parametrize("method", reference.METHODS)
def test_nan_logits_show_in_the_gates(method):
    logits = torch.tensor([[float("nan"), 1.0, -1.0], [2.0, 1.0, -1.0]])
    gates, _ = dsmoe_ext.route(logits, 0.5, offsets_of([2] * 3), method=method, top_k=1)
    assert gates[0].isnan().any() and not gates[1].isnan().any()


def test_infinite_and_extreme_logits():
    logits = torch.tensor([[float("inf"), float("-inf"), 90.0, -90.0]])
    gates, scores = dsmoe_ext.route(logits, 0.5, offsets_of([2] * 4), rescale=False)
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    assert torch.equal(gates, torch.tensor([[1.0, 0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("method", ["top_k", "top_p"])
@pytest.mark.parametrize("gates", reference.GATES)
def test_gates_that_underflow_are_inactive(method, gates):
    logits = torch.tensor([[1000.0, 0.0, -1.0, 2.0]])
    options = dict(method=method, top_k=3, gates=gates)
    ours = dsmoe_ext.route(logits, 1.0, offsets_of([2] * 4), **options)
    wanted = reference.route(logits, 1.0, offsets_of([2] * 4), **options)
    torch.testing.assert_close(ours.gates, torch.tensor([[4.0, 0.0, 0.0, 0.0]]))
    torch.testing.assert_close(wanted[0], ours.gates)


def test_half_logits_are_computed_in_float32(seed):
    logits = torch.randn(50, 8).bfloat16()
    ours = dsmoe_ext.route(logits, 0.5, offsets_of([3] * 8))
    wanted = dsmoe_ext.route(logits.float(), 0.5, offsets_of([3] * 8))
    assert torch.equal(ours.gates, wanted.gates) and ours.gates.dtype == torch.float32


def test_strided_logits(seed):
    logits = torch.randn(8, 20, dtype=torch.float64)[:, ::2].t()
    ours = dsmoe_ext.route(logits, 0.5, offsets_of([3] * 8))
    wanted = dsmoe_ext.route(logits.contiguous(), 0.5, offsets_of([3] * 8))
    assert torch.equal(ours.gates, wanted.gates)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(method="top_q"), "method must be one of threshold, top_p, top_k, relu"),
        (dict(gates="soft"), "gates must be one of scores, binary"),
        (dict(method="top_k", top_k=9), "top_k must be between 1 and the number of routed experts"),
        (dict(method="top_k", top_k=0), "top_k must be between 1 and the number of routed experts"),
        (dict(logits=torch.zeros(4)), "logits must have shape"),
        (dict(logits=torch.zeros(4, 0)), "at least one column"),
        (dict(expert_offsets=offsets_of([1, 1])), "one entry more than there are experts"),
        (dict(expert_offsets=offsets_of([1] * 4).long()), "must be int32"),
        (dict(expert_offsets=torch.tensor([0, 2, 1, 3, 4]).int()), "start at 0 and never descend"),
        (dict(threshold=torch.zeros(2)), "threshold must be one float32 number"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(logits=torch.zeros(4, 4), threshold=0.5, expert_offsets=offsets_of([1] * 4))
    with pytest.raises((RuntimeError, ValueError), match=message):
        dsmoe_ext.route(**{**arguments, **change})

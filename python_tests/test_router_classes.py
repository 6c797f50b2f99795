"""Every router against its paper's formula in plain PyTorch, values and gradients; edges."""

import copy
import math
import pickle
import re
from pathlib import Path

import pytest
import torch

from dsmoe_ext import routers
from dsmoe_ext.ops import Routing, sparse_ffn
from dsmoe_ext.routers.top_p import within_capacity

pytestmark = pytest.mark.quick
SIZES = [8, 4, 8, 2, 6]  # the first one is shared where num_shared is 1
HIDDEN, TOKENS = 12, 30
NAMES = routers.router_names()


def make(name, num_shared=0, dtype=torch.float64, **options):
    """A router with random parameters, and gate_proj [I,H]."""
    router = routers.router_class(name)(HIDDEN, SIZES, num_shared, dtype=dtype, **options)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return router, torch.randn(sum(SIZES), HIDDEN, dtype=dtype)


def inputs(dtype=torch.float64):
    return torch.randn(TOKENS, HIDDEN, dtype=dtype)


def check(router, gate_proj, want_gates, want_scores, x):
    """Values, and gradients of x and all parameters, of gates at active pairs and of all scores."""
    x.requires_grad_()
    parameters = [x, *router.parameters()]
    gates, scores = router.route(x, gate_proj)
    wanted_gates, wanted_scores = want_gates(x), want_scores(x)
    torch.testing.assert_close(gates[:, router.num_shared :], wanted_gates, rtol=1e-9, atol=1e-12)
    assert (gates[:, : router.num_shared] == 1).all()
    torch.testing.assert_close(scores, wanted_scores, rtol=1e-9, atol=1e-12)
    weight = torch.randn_like(scores)
    active = (wanted_gates != 0).detach()
    results = []
    for routed, score in ((gates[:, router.num_shared :], scores), (wanted_gates, wanted_scores)):
        loss = (routed * weight * active).sum() + (score * weight.flip(0)).sum()
        results.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for ours, theirs in zip(*results, strict=True):
        if theirs is None or ours is None:
            assert all(g is None or not g.any() for g in (ours, theirs))
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def keep_largest(logits, k):
    """The k largest of every row, -inf elsewhere; of equal ones the first."""
    out = torch.full_like(logits, -math.inf)
    for t, row in enumerate(logits.tolist()):
        for e in sorted(range(len(row)), key=lambda e: -row[e])[:k]:
            out[t, e] = logits[t, e]
    return out


def factor(gates, num_shared):
    """I_routed / active neurons."""
    sizes = torch.tensor(SIZES[num_shared:], dtype=torch.float64)
    return sizes.sum() / ((gates != 0) * sizes).sum(1, keepdim=True).clamp(min=1)


@pytest.mark.parametrize("num_shared", [0, 1])
def test_threshold(num_shared, seed):
    router, gate_proj = make("threshold", num_shared)
    s = lambda x: (x @ router.weight.T).sigmoid()  # noqa: E731

    def gates(x):
        kept = torch.where(s(x) > 0.5, s(x), 0.0)
        return kept * factor(kept.detach(), num_shared)

    check(router, gate_proj, gates, s, inputs())


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 0.9, 1.0])
def test_top_p(t, seed):
    router, gate_proj = make("top_p", threshold=t)
    p = lambda x: (x @ router.weight.T).softmax(1)  # noqa: E731

    def gates(x):
        kept = torch.zeros_like(p(x))
        for token, row in enumerate(p(x)):
            before = 0.0
            for rank, e in enumerate(row.argsort(descending=True).tolist()):
                if rank == 0 or before < float(torch.tensor(t)) or t == 1:
                    kept[token, e] = row[e]
                before += row[e].item()
        return kept

    check(router, gate_proj, gates, p, inputs())
    active = (router.route(inputs()).gates != 0).sum(1)
    assert (active == 1).all() if t == 0 else (active == len(SIZES)).all() if t == 1 else True


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_top_k(renormalize, rescale, seed):
    router, gate_proj = make("top_k", 1, renormalize=renormalize, rescale=rescale, bias=True)
    logits = lambda x: x @ router.weight.T + router.bias  # noqa: E731

    def gates(x):
        kept = keep_largest(logits(x), 2)
        p = logits(x).softmax(1) * (kept > -math.inf)
        values = kept.softmax(1) if renormalize else p
        return values * factor(values.detach(), 1) if rescale else values

    check(router, gate_proj, gates, lambda x: logits(x).softmax(1), inputs())


def test_modse(seed):
    router, gate_proj = make("modse")

    def logits(x):
        noise = torch.log1p((x @ router.noise_weight.T).exp())
        mean_square = noise.square().mean(1, keepdim=True) + torch.finfo(torch.float64).eps
        gain = router.noise_gain
        return x @ router.weight.T + noise / mean_square.sqrt() * gain

    check(
        router, gate_proj,
        lambda x: keep_largest(logits(x), 2).softmax(1), lambda x: logits(x).softmax(1), inputs(),
    )  # fmt: skip


def test_relu(seed):
    router, gate_proj = make("relu")
    r = lambda x: (x @ router.weight.T).clamp(min=0)  # noqa: E731
    check(router, gate_proj, r, r, inputs())


def test_mean_score(seed):
    router, gate_proj = make("mean_score", 1)
    starts = torch.tensor([0, *SIZES]).cumsum(0).tolist()

    def logits(x):
        pre = x @ gate_proj.T
        columns = [pre[:, starts[e] : starts[e + 1]].mean(1) for e in range(1, len(SIZES))]
        return torch.stack(columns, 1)

    def gates(x):  # constants: no gradient passes through the choice
        return (keep_largest(logits(x), 2) > -math.inf).double()

    check(router, gate_proj, gates, lambda x: logits(x).softmax(1), inputs())


def test_mean_score_keeps_its_keys_in_evaluation_only(seed):
    router, gate_proj = make("mean_score")
    x = inputs()
    with torch.no_grad():
        router.eval()
        before = router.route(x, gate_proj)
        other = torch.randn_like(gate_proj)
        assert torch.equal(router.route(x, other).gates, before.gates)
        router.train()
        assert not torch.equal(router.route(x, other).scores, before.scores)
        fresh = router.eval().route(x, other).scores
        assert torch.equal(router.route(x).scores, fresh)
    with pytest.raises(ValueError, match="pass it"):
        router.train()(x)


def test_recurrent(seed):
    """Three layers against torch's GRUCell equations; gradients reach all layers before."""
    layers = [make("recurrent", state_size=7)[0] for _ in range(3)]
    for index, layer in enumerate(layers):
        layer.join(index, layers[0])
    owned = [sum("gru" in name for name in layer.state_dict()) for layer in layers]
    assert owned == [4, 0, 0]
    xs = [inputs().requires_grad_() for _ in layers]
    gru = layers[0].gru
    h, wanted = torch.zeros(TOKENS, 7, dtype=torch.float64), []
    for layer, x in zip(layers, xs, strict=True):
        v = x @ layer.project_weight.T + layer.project_bias
        i_r, i_z, i_n = (v @ gru.weight_ih.T + gru.bias_ih).chunk(3, 1)
        h_r, h_z, h_n = (h @ gru.weight_hh.T + gru.bias_hh).chunk(3, 1)
        r, z = (i_r + h_r).sigmoid(), (i_z + h_z).sigmoid()
        h = (1 - z) * (i_n + r * h_n).tanh() + z * h
        wanted.append(keep_largest(h @ layer.weight.T, 2).softmax(1))
    got = [layer.route(x).gates for layer, x in zip(layers, xs, strict=True)]
    weight = torch.randn_like(wanted[2])
    leaves = [*xs, *(p for layer in layers for p in layer.parameters())]
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    results = []
    for gates in (got[2], wanted[2]):
        loss = (gates * weight * (wanted[2] != 0)).sum()
        results.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for ours, theirs in zip(*results, strict=True):
        assert theirs is None or theirs.any()
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(RuntimeError, match="layer after layer"):
        layers[2](inputs()[:4])


def test_prefix(seed):
    router, _ = make("prefix", 1)
    x = inputs()
    assert (router.eval().route(x).gates == 1).all()
    for active in range(5):
        router.turn(active)
        want = torch.tensor([1.0] * (1 + active) + [0.0] * (4 - active), dtype=torch.float64)
        assert torch.equal(router.route(x).gates, want.expand(TOKENS, 5))
    other, _ = make("prefix", 1)
    drawn = []
    for step in range(400):
        for layer in (router, other):
            layer.train().start_step(step)
        drawn.append(int(router.route(x).gates[0].sum()) - 1)
        assert torch.equal(router.route(x).gates, other.route(x).gates)
    counts = torch.tensor(drawn).bincount(minlength=5).tolist()
    assert counts[0] == 0 and min(counts[1:]) > 60  # 400 draws of 4: 100 each, 8.7 is sigma


def test_capacity(seed):
    """Against XMoE's rule written as a queue: by rank, then by probability."""
    scores = torch.rand(40, 3, dtype=torch.float64).softmax(1)
    active = torch.rand(40, 3) < 0.7
    kept = within_capacity(scores, active, 9)
    for e in range(3):
        ranks = [sorted(range(3), key=lambda i: -row[i]).index(e) for row in scores.tolist()]
        queue = [t for t in range(40) if active[t, e]]
        queue.sort(key=lambda t: (ranks[t], -scores[t, e].item()))
        assert kept[:, e].nonzero().flatten().tolist() == sorted(queue[:9])
    router, _ = make("top_p", 1, threshold=1.0, capacity_factor=0.5)
    gates = router.route(inputs()).gates
    assert (gates[:, 1:] != 0).sum(0).tolist() == [4] * 4  # max(4, ceil(30/4 · 0.5))
    assert (gates[:, 0] == 1).all()


@pytest.mark.parametrize("name", NAMES)
class TestEdges:
    @pytest.mark.parametrize("value", [0.0, 3.0])
    def test_equal_logits(self, name, value, seed):
        """Equal logits: all experts, or the first ones."""
        router, gate_proj = make(name)
        for parameter in router.parameters():
            torch.nn.init.zeros_(parameter)
        gates, scores = router.route(
            torch.full((4, HIDDEN), value, dtype=torch.float64), 0 * gate_proj
        )
        want = {"threshold": 0, "top_p": 5, "relu": 0, "prefix": 5}.get(name, 2)
        assert (gates != 0).sum(1).tolist() == [want] * 4
        assert gates.isfinite().all() and scores.isfinite().all()
        assert not gates[:, want:].any()

    def test_one_expert(self, name, seed):
        options = {"top_k": 1} if "top_k" in routers.router_class(name).defaults else {}
        router = routers.router_class(name)(HIDDEN, [9], **options)
        gates, _ = router.route(inputs(torch.float32), torch.randn(9, HIDDEN))
        if name not in ("threshold", "relu"):
            torch.testing.assert_close(gates, torch.ones(TOKENS, 1))

    def test_no_tokens(self, name, seed):
        router, gate_proj = make(name)
        gates, scores = router.route(inputs()[:0], gate_proj)
        assert gates.shape == scores.shape == (0, 5)

    def test_nan_shows(self, name, seed):
        """NaN in a token is active in that token and changes no other."""
        router, gate_proj = make(name)
        x = inputs()
        with torch.no_grad():
            clean = router.route(x, gate_proj).gates
            x[3, 2] = math.nan
            gates = router.route(x, gate_proj).gates
        assert name in ("prefix", "mean_score") or gates[3].isnan().any()
        assert (gates[3] != 0).any()
        rest = torch.arange(TOKENS) != 3
        assert torch.equal(gates[rest], clean[rest])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_float32_throughout(self, name, dtype, seed):
        router, gate_proj = make(name, dtype=torch.float32)
        router = router.to(dtype)
        assert {p.dtype for p in router.parameters()} <= {torch.float32}
        x = inputs(torch.float32).to(dtype)
        with torch.autocast("cpu", dtype=dtype):
            gates, scores = router.route(x, gate_proj)
        assert gates.dtype == scores.dtype == torch.float32
        assert torch.equal(gates, router.route(x.float(), gate_proj).gates)

    def test_copies_and_state(self, name, seed):
        router, gate_proj = make(name)
        x = inputs()
        gates = router.route(x, gate_proj).gates
        for other in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
            assert torch.equal(other.route(x, gate_proj).gates, gates)
        fresh, _ = make(name)
        fresh.load_state_dict(router.state_dict())
        assert torch.equal(fresh.route(x, gate_proj).gates, gates)

    def test_in_front_of_the_ffn(self, name, seed):
        """Gates are what sparse_ffn takes; gradients come back through both."""
        router, gate_proj = make(name, 1, dtype=torch.float32)
        x = inputs(torch.float32)
        weights = [gate_proj.requires_grad_(), *torch.randn(2, sum(SIZES), HIDDEN)]
        y = sparse_ffn(x, router.route(x, gate_proj).gates, *weights, router.offsets(x.device))
        y.square().sum().backward()
        assert gate_proj.grad.abs().sum() > 0
        trained = {n: p.grad for n, p in router.named_parameters() if "noise" not in n}
        assert all(
            g is not None and g.any() for n, g in trained.items() if "gru.weight_hh" not in n
        )

    def test_knob(self, name, seed):
        router, gate_proj = make(name)
        if router.knob is None:
            with pytest.raises(ValueError, match="no knob"):
                router.turn(1)
            return
        x, shares = inputs(), []
        for value in {"threshold": [0.2, 0.5, 0.8]}.get(router.knob, [1, 2, 4]):
            router.eval().turn(value)
            shares.append((router.route(x, gate_proj).gates != 0).double().mean())
        assert shares == sorted(shares, reverse=name == "threshold") and shares[0] != shares[-1]

    def test_bad_options(self, name):
        with pytest.raises(TypeError, match="has no option 'tau'"):
            routers.router_class(name)(HIDDEN, SIZES, tau=0.5)
        with pytest.raises(ValueError, match="needs a routed expert"):
            routers.router_class(name)(HIDDEN, [4], 1)


def test_infinite_logits(seed):
    """-inf switches an expert off, in every rule; a row of them is NaN where softmax is."""
    logits = torch.tensor([[-math.inf, 1.0, 0.5], [2.0, -math.inf, -math.inf]])
    for name in ("threshold", "top_p", "top_k", "relu"):
        router = routers.router_class(name)(HIDDEN, [4, 4, 4])
        gates = router.pick(logits).gates
        assert gates.isfinite().all() and not gates[logits == -math.inf].any()
    nothing = torch.full((1, 3), -math.inf)
    assert routers.router_class("top_k")(HIDDEN, [4, 4, 4]).pick(nothing).gates.isnan().any()
    assert not routers.router_class("relu")(HIDDEN, [4, 4, 4]).pick(nothing).gates.any()


def test_names():
    with pytest.raises(ValueError, match="there is no router 'best'"):
        routers.router_class("best")
    with pytest.raises(ValueError, match="top_k"):
        routers.router_class("top_k")(HIDDEN, SIZES, top_k=6)
    with pytest.raises(ValueError, match="is the name of TopKRouter"):
        routers.register("top_k")(routers.Router)


def test_example_of_the_docs(monkeypatch):
    """The router of one's own in docs/methods.md, as it stands there."""
    from dsmoe_ext.routers import interface

    # Without what the page registered where it ran as a whole (test_docs.py).
    others = {name: cls for name, cls in interface._BY_NAME.items() if name != "loud"}
    monkeypatch.setattr(interface, "_BY_NAME", others)
    page = Path(__file__).parent.parent / "docs" / "methods.md"
    example = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL).group(1)
    assert example.count("\n") <= 14
    exec(example, {})
    router = routers.router_class("loud")(HIDDEN, SIZES)
    x = torch.cat([torch.full((1, HIDDEN), 9.0), torch.zeros(1, HIDDEN)])
    routing = router.route(x)
    assert isinstance(routing, Routing)
    assert routing.gates.tolist() == [[1.0] * 5, [1.0, 0, 0, 0, 0]]

"""DSMoEFFN: the formula, its options, its state; and that it is a drop-in for LLaMA's MLP."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize

import dsmoe_ext
from dsmoe_ext import DSMoEFFN, reference

pytestmark = pytest.mark.quick


def random_ffn(**options) -> DSMoEFFN:
    """H 24, I 40; random routers with a bias, so that masks are mixed."""
    options = {"num_experts": 4, "router_init": "paper", "router_bias": True} | options
    ffn = DSMoEFFN(24, 40, **options)
    with torch.no_grad():
        for parameter in ffn.router.parameters():
            parameter.normal_(std=0.4)
    return ffn


def dense_function(ffn: DSMoEFFN, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = ffn.expert_weights()
    return torch.nn.functional.silu(x @ gate.t()) * (x @ up.t()) @ down


def by_reference(ffn: DSMoEFFN, x: torch.Tensor, grad_weight=None) -> torch.Tensor:
    logits = x @ ffn.router.weight.t() + ffn.router.bias
    gates, _ = reference.route(
        logits,
        ffn.threshold,
        ffn.expert_offsets,
        method=ffn.method,
        top_k=ffn.router.top_k,
        gates=ffn.gates,
        rescale=ffn.router.options["rescale"],
        gate_scale=ffn.router.gate_scale,
    )
    weights = ffn.expert_weights()
    if grad_weight == "exact":
        grad_weight = torch.ones_like(gates)
    return reference.sparse_ffn(x, gates, *weights, ffn.expert_offsets, grad_weight=grad_weight)


@pytest.mark.parametrize("method", ["threshold", "top_p", "top_k", "relu"])
@pytest.mark.parametrize("ste", ["active", "exact"])
@pytest.mark.parametrize("gates", ["scores", "binary"])
@pytest.mark.parametrize("shared_size", [0, 8])
def test_forward_and_gradients(method, ste, gates, shared_size, seed):
    ffn = random_ffn(
        method=method, ste=ste, gates=gates, shared_size=shared_size, dtype=torch.float64
    )
    x = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    inputs = [x, *ffn.parameters()]
    dy = torch.randn(3, 5, 24, dtype=torch.float64)

    y = ffn(x)
    ours = torch.autograd.grad(y, inputs, dy)
    want = by_reference(ffn, x.reshape(15, 24), "exact" if ste == "exact" else None)
    gradients = torch.autograd.grad(want, inputs, dy.reshape(15, 24))

    assert y.shape == x.shape
    torch.testing.assert_close(y, want.view(3, 5, 24))
    for got, gradient in zip(ours, gradients, strict=True):
        torch.testing.assert_close(got, gradient.view_as(got))


def test_exact_ste_is_the_papers_formula(seed):
    """dL/dz_e = sigmoid'(z_e) (E/k) <dL/dh, o_e> for all e, active or not, and dx gets dz Y^T."""
    ffn = random_ffn(ste="exact", dtype=torch.float64)
    x = torch.randn(17, 24, dtype=torch.float64, requires_grad=True)
    dh = torch.randn(17, 24, dtype=torch.float64)
    (ffn(x) * dh).sum().backward()

    z = x.detach() @ ffn.router.weight.t() + ffn.router.bias
    s = z.sigmoid()
    mask = s > 0.5
    factor = torch.where(mask.any(1), 4 / mask.sum(1), 1.0).unsqueeze(1)
    gate, up, down = ffn.expert_weights()
    activations = torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())
    outputs = activations.view(17, 4, 10).transpose(0, 1) @ down.reshape(4, 10, 24)
    assert not mask.all() and mask.any()
    dz = s * (1 - s) * factor * (outputs * dh).sum(-1).t()

    torch.testing.assert_close(ffn.router.weight.grad, dz.t() @ x)
    torch.testing.assert_close(ffn.router.bias.grad, dz.sum(0))
    expert_part = torch.autograd.grad(
        ((mask * s * factor).detach().t().unsqueeze(2) * outputs).sum(0), x, dh
    )[0]
    torch.testing.assert_close(x.grad, expert_part + dz @ ffn.router.weight)


@pytest.mark.parametrize("method", ["threshold", "relu", "top_p", "top_k"])
@pytest.mark.parametrize("gates", ["scores", "binary"])
@pytest.mark.parametrize("router", ["linear", "modse"])
@pytest.mark.parametrize("shared_size", [0, 8])
def test_dense_start_is_the_dense_function(method, gates, router, shared_size, seed):
    threshold = 1.0 if method == "top_p" else 0.5
    ffn = DSMoEFFN(
        24, 40, 4, threshold, method=method, top_k=4, gates=gates, router=router,
        shared_size=shared_size,
    )  # fmt: skip
    x = torch.randn(9, 24)
    torch.testing.assert_close(ffn(x), dense_function(ffn, x))


def test_paper_start_is_half_active(seed):
    ffn = DSMoEFFN(256, 64, 8, router_init="paper")
    assert ffn.router.bias is None
    ffn.eval()(torch.randn(500, 256))
    assert 0.3 < dsmoe_ext.active_fraction(ffn).mean < 0.7


def test_no_expert_active_adds_nothing(seed):
    ffn = random_ffn(ste="exact")
    dsmoe_ext.set_threshold(ffn, 1.0)
    y = ffn(torch.randn(6, 24))
    assert torch.equal(y, torch.zeros(6, 24))
    y.sum().backward()
    assert ffn.router.weight.grad.abs().sum() > 0 and ffn.gate_proj.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("sizes", [[4, 8, 12, 8], [0.5, 1.0, 1.5, 1.0], [1.0, 1.0, 1.0]])
def test_unequal_sizes(sizes, seed):
    ffn = DSMoEFFN(24, 40, expert_sizes=sizes, shared_size=8)
    cut = ffn.expert_offsets.diff().tolist()
    assert cut[0] == 8 and sum(cut) == 40 and len(cut) == 1 + len(sizes)
    if sizes[0] == 0.5:
        assert cut == [8, 4, 8, 12, 8]
    x = torch.randn(9, 24)
    torch.testing.assert_close(ffn(x), dense_function(ffn, x))


def test_leading_dimensions(seed):
    ffn = random_ffn()
    x = torch.randn(2, 3, 4, 24)
    y = ffn(x)
    assert y.shape == x.shape
    torch.testing.assert_close(y.view(24, 24), ffn(x.view(24, 24)))
    torch.testing.assert_close(ffn(x[0, 0, 0]), y[0, 0, 0])
    assert ffn(x[:0]).shape == (0, 3, 4, 24)
    strided = torch.randn(24, 7).t()
    torch.testing.assert_close(ffn(strided), ffn(strided.contiguous()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, seed):
    ffn = random_ffn(ste="exact")
    x = torch.randn(50, 24)
    with torch.autocast("cpu", dtype=dtype):
        y, routing = ffn(x, return_routing=True)
        y.sum().backward()
    _, plain = ffn(x, return_routing=True)

    assert y.dtype == dtype
    assert torch.equal(routing.gates, plain.gates)  # routing stays float32
    weights = [weight.to(dtype) for weight in ffn.expert_weights()]
    assert torch.equal(
        y, dsmoe_ext.sparse_ffn(x.to(dtype), plain.gates, *weights, ffn.expert_offsets)
    )
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ffn.parameters())


def test_router_and_threshold_stay_float32(seed):
    ffn = random_ffn(threshold=0.1234567)
    tau = ffn.threshold.clone()
    ffn.to(torch.bfloat16)
    assert ffn.gate_proj.weight.dtype == torch.bfloat16
    assert ffn.router.weight.dtype == ffn.threshold.dtype == torch.float32
    assert torch.equal(ffn.threshold, tau)
    assert ffn(torch.randn(4, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_router_of_float64(seed):
    ffn = random_ffn(threshold=0.1234567).double().eval()
    assert ffn.router.weight.dtype == torch.float64 and ffn.threshold.dtype == torch.float32
    x = torch.randn(4, 24, dtype=torch.float64)
    with torch.no_grad():
        y = ffn(x)
        torch.testing.assert_close(ffn.pack()(x), y)
    ffn.to(torch.bfloat16)
    assert ffn.router.weight.dtype == torch.float32
    assert ffn(x.bfloat16()).dtype == torch.bfloat16


class Lowrank(torch.nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(rows, 2) * 0.1)
        self.b = torch.nn.Parameter(torch.randn(2, columns) * 0.1)

    def forward(self, weight):
        return weight + self.a @ self.b


def test_parametrised_weights(seed):
    """LoRA replaces the parameters on every access; only its own matrices get gradients."""
    ffn = random_ffn(ste="exact", dtype=torch.float64).requires_grad_(False)
    for name in ffn.names:
        holder = getattr(ffn, name)
        parametrize.register_parametrization(
            holder, "weight", Lowrank(*holder.weight.shape).double()
        )
    parametrize.register_parametrization(ffn.router, "weight", Lowrank(4, 24).double())
    x = torch.randn(11, 24, dtype=torch.float64)
    trainable = [p for p in ffn.parameters() if p.requires_grad]
    assert len(trainable) == 8

    ours = torch.autograd.grad(ffn(x).square().sum(), trainable)
    want = torch.autograd.grad(by_reference(ffn, x, "exact").square().sum(), trainable)
    for got, gradient in zip(ours, want, strict=True):
        torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize("ste", ["active", "exact", "sampled"])
def test_compiles_as_one_graph(ste, seed):
    ffn = random_ffn(ste=ste, seed=1)
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    x = torch.randn(20, 24)
    before = ffn.draw_counter.clone()
    y = ffn(x)
    gradient = torch.autograd.grad(y.sum(), ffn.router.weight)[0]
    ffn.draw_counter.copy_(before)
    got = compiled(x)
    torch.testing.assert_close(got, y)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), ffn.router.weight)[0], gradient)
    assert dsmoe_ext.active_fraction(ffn).num_tokens == 40


def test_packed(seed):
    ffn = random_ffn(shared_size=8).eval()
    x = torch.randn(2, 9, 24)
    with torch.no_grad():
        want = ffn(x)
        torch.testing.assert_close(ffn.pack()(x), want)
    assert ffn(x.requires_grad_()).requires_grad  # gradients come from the weights themselves
    for drop in (
        lambda: ffn.train().eval(),
        lambda: ffn.load_state_dict(ffn.state_dict()),
        lambda: ffn.to(torch.float64).to(torch.float32),
    ):
        ffn.pack()
        assert ffn._packed is not None
        drop()
        assert ffn._packed is None
    assert copy.deepcopy(ffn.pack())._packed is None
    with pytest.raises(RuntimeError, match="eval"):
        ffn.train().pack()


@pytest.mark.parametrize("change", ["copy_", "add_", "assign"])
def test_packed_anew_once_weights_have_changed(change, seed):
    """In place, in eval mode, as averages of models and merged adapters do; or another tensor."""
    ffn, other = random_ffn(shared_size=8).eval(), random_ffn(shared_size=8).eval()
    other.router.load_state_dict(ffn.router.state_dict())
    x = torch.randn(2, 9, 24)
    with torch.no_grad():
        first = ffn.pack()._packed
        ffn(x)
        assert ffn._packed is first
        for name in ffn.names:
            mine, theirs = getattr(ffn, name), getattr(other, name).weight
            if change == "copy_":
                mine.weight.copy_(theirs)
            elif change == "add_":
                mine.weight.add_(theirs - mine.weight)
            else:
                mine.weight = torch.nn.Parameter(theirs.clone())
        torch.testing.assert_close(ffn(x), other(x))
        assert ffn._packed is not None and ffn._packed is not first


def test_state_dict_restores_everything(seed):
    ffn = random_ffn(ste="sampled", shared_size=8)
    ffn.permutation.copy_(torch.randperm(40))
    dsmoe_ext.set_threshold(ffn, 0.3)
    x = torch.randn(7, 24)
    ffn(x).sum().backward()
    other = random_ffn(ste="sampled", shared_size=8)
    other.load_state_dict(ffn.state_dict())
    assert torch.equal(other(x), ffn(x)) and other.draw_counter == 2
    assert torch.equal(other.permutation, ffn.permutation)


@pytest.mark.parametrize("permuted", [False, True])
def test_mlp_there_and_back(permuted, make_llama, seed):
    llama = make_llama()
    mlp = llama.model.layers[0].mlp
    permutation = torch.randperm(48) if permuted else None
    ffn = DSMoEFFN.from_mlp(mlp, 4, shared_size=8, permutation=permutation)
    x = torch.randn(5, 32)
    torch.testing.assert_close(ffn(x), mlp(x))
    if permuted:
        assert torch.equal(ffn.gate_proj.weight, mlp.gate_proj.weight[permutation])
    for name, weight in zip(ffn.names, ffn.dense_weights(), strict=True):
        assert torch.equal(weight, mlp.state_dict()[f"{name}.weight"])


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("fused", [False, True])
def test_every_kind_of_gated_mlp(activation, fused, seed):
    """Fused gate and up, every activation: forward and gradients against the formula."""
    names = ("gate_up_proj", "down_proj") if fused else ("w1", "w3", "w2")
    ffn = random_ffn(activation=activation, names=names, dtype=torch.float64, ste="exact")
    assert {name for name, _ in ffn.named_children()} >= set(names)
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    inputs = [x, *ffn.parameters()]
    gate, up, down = ffn.expert_weights()
    if fused:
        gate, up = gate.chunk(2)
    y, routing = ffn(x, return_routing=True)
    ours = torch.autograd.grad(y.square().sum(), inputs)
    offsets, ones = ffn.expert_offsets, torch.ones_like(routing.gates)
    options = dict(grad_weight=ones, activation=activation)
    gates = ffn(x, return_routing=True)[1].gates
    want = reference.sparse_ffn(x, gates, gate, up, down, offsets, **options)
    gradients = torch.autograd.grad(want.square().sum(), inputs)
    torch.testing.assert_close(y, want)
    for got, gradient in zip(ours, gradients, strict=True):
        torch.testing.assert_close(got, gradient)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_experts": 7}, "does not divide"),
        ({"expert_sizes": [10, 10]}, "sum to 20"),
        ({"expert_sizes": [40, 0]}, "at least one"),
        ({"shared_size": 40}, "shared_size"),
        ({"shared_size": 3}, "does not divide"),
        ({"method": "topk"}, "threshold, top_p, top_k, relu"),
        ({"gates": "soft"}, "scores, binary"),
        ({"ste": "none"}, "active, exact, sampled"),
        ({"router": "gru"}, "linear, modse"),
        ({"router_init": "zero"}, "dense, paper"),
        ({"router_bias": False}, "router bias"),
        ({"threshold": 1.0}, "threshold"),
        ({"method": "top_k", "top_k": 9}, "top_k"),
        ({"sample_prob": 0.0}, "sample_prob"),
        ({"dtype": torch.int32}, "dtype"),
    ],
)
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        DSMoEFFN(24, 40, **({"num_experts": 8} | options))


def test_input_errors():
    ffn = random_ffn()
    for x in (torch.randn(3, 48), torch.randn(24, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"shape \[..., 24\]"):
            ffn(x)
    with pytest.raises(RuntimeError, match="dtype"):
        ffn(torch.randn(3, 24, dtype=torch.float64))


def test_mlp_errors(make_llama):
    biased = make_llama(mlp_bias=True).model.layers[0].mlp
    with pytest.raises(ValueError, match="bias"):
        DSMoEFFN.from_mlp(biased)
    relu = make_llama(hidden_act="relu").model.layers[0].mlp
    with pytest.raises(ValueError, match="SiLU"):
        DSMoEFFN.from_mlp(relu)
    mlp = make_llama().model.layers[0].mlp
    with pytest.raises(TypeError, match="gate_proj"):
        DSMoEFFN.from_mlp(torch.nn.Linear(3, 3))
    for permutation in (torch.zeros(48), torch.arange(47)):
        with pytest.raises(ValueError, match="once"):
            DSMoEFFN.from_mlp(mlp, permutation=permutation)
    assert "experts=8 x 6" in repr(DSMoEFFN.from_mlp(mlp))
    mlp.norm = torch.nn.LayerNorm(48)
    with pytest.raises(ValueError, match="LayerNorm inside"):
        DSMoEFFN.from_mlp(mlp)

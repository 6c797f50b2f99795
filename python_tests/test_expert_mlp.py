"""sparse_ffn, forward and every gradient, against the reference in float64 (dsmoe_ext.testing)."""

from dataclasses import replace

import pytest
import torch

import dsmoe_ext
from dsmoe_ext import ops, reference
from dsmoe_ext.testing import check_case, offsets_of, random_case, run_case

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# name: (T, H, sizes, active)
EDGES = {
    "no token": (0, 16, [8, 8], 0.5),
    "one token": (1, 64, [32] * 4, 0.5),
    "one token, all": (1, 64, [32] * 4, 1.0),
    "three tokens": (3, 96, [40, 24, 8], 0.7),
    "none active": (9, 32, [16, 16], 0.0),
    "all active": (70, 64, [32] * 4, 1.0),
    "off every tile": (67, 61, [13, 29, 7, 1, 3], 0.5),
    "unequal": (129, 80, [100, 4, 60, 36], 0.4),
    "empty experts": (33, 48, [0, 20, 0, 12, 0], 0.6),
    "shared and fine": (65, 96, [96] + [16] * 18, 0.5),
    "one expert": (40, 32, [64], 1.0),
    "512 experts": (20, 32, [2] * 512, 0.1),
    "many tokens": (600, 32, [16] * 4, 0.5),
    "hidden size one": (5, 1, [3, 2], 0.5),
    "narrow, an empty expert": (5, 8, [3, 0, 2], 0.7),
    "hidden size zero": (5, 0, [3, 2], 0.5),
}


@pytest.mark.quick
@pytest.mark.parametrize("ste", ["active", "exact"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge, dtype, ste, seed):
    num_tokens, hidden_size, sizes, active = EDGES[edge]
    case = random_case(
        seed, num_tokens, hidden_size, sizes, active=active, exact_ste=ste == "exact", dtype=dtype
    )
    check_case(dsmoe_ext.sparse_ffn, case)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_computed_again(dtype, seed):
    case = random_case(seed, 65, 48, [20, 12, 16], dtype=dtype, exact_ste=True)
    check_case(lambda *a, **k: dsmoe_ext.sparse_ffn(*a, save_activations=False, **k), case)


@pytest.mark.quick
@pytest.mark.parametrize("saved", [True, False], ids=["saved", "recomputed"])
def test_activations_beyond_float16(saved, seed):
    """Of g and u the backward has 65504 at most: infinity would make NaN of gradients."""
    case = random_case(seed, 20, 32, [16, 40], active=1.0, dtype=torch.float16)
    case.gate_proj *= 5e4
    case.up_proj /= 10
    case.dy /= 1000

    def kept(v):
        return v + (v.clamp(-65504, 65504) - v).detach()

    def ffn_of_kept(x, gates, gate_proj, up_proj, down_proj_t, expert_offsets, grad_weight=None):
        g, u = x @ gate_proj.t(), x @ up_proj.t()
        assert g.abs().max() > 8e4
        weights = reference.expand_experts(gates, expert_offsets).to(x.dtype)
        return (torch.nn.functional.silu(kept(g)) * kept(u) * weights) @ down_proj_t

    ours = run_case(lambda *a, **k: dsmoe_ext.sparse_ffn(*a, save_activations=saved, **k), case)
    exact = run_case(ffn_of_kept, case.to(torch.float64))
    for name in exact.keys() - {"y"}:
        error = (ours[name].double() - exact[name]).abs().max()
        assert error <= 0.01 * exact[name].abs().max(), name


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_grad_weight(dtype, seed):
    case = random_case(seed, 50, 48, [20, 12, 16, 8], dtype=dtype)
    case.grad_weight = (torch.rand_like(case.gates) < 0.25).to(case.gates) * 4.0
    check_case(dsmoe_ext.sparse_ffn, case)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_one_sign(dtype, seed):
    """They grow with every term, and with them what an accumulator of half type would lose."""
    case = random_case(seed, 20, 512, [512], active=1.0, dtype=dtype)
    for tensor in (case.x, case.gate_proj, case.up_proj, case.down_proj_t, case.dy):
        tensor.abs_()
    check_case(dsmoe_ext.sparse_ffn, case)


@pytest.mark.quick
def test_one_expert_takes_all(seed):
    case = random_case(seed, 200, 40, [16] * 5, active=0.0)
    case.gates[:, 3] = 0.7
    check_case(dsmoe_ext.sparse_ffn, case)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 5, 16, 70])
@pytest.mark.parametrize("sizes", [[32] * 4, [96] + [16] * 6, [13, 0, 29, 7]], ids=str)
def test_packed(num_tokens, sizes, dtype, seed):
    check_packed(random_case(seed, num_tokens, 72, sizes, dtype=dtype))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 9, 30])
@pytest.mark.parametrize("hidden_size, sizes", [(600, [16, 40]), (1032, [264, 24]), (24, [1032])])
def test_packed_in_blocks(hidden_size, sizes, num_tokens, dtype, seed):
    """Sums longer than a block of packed weights, and those too long for blocks."""
    check_packed(random_case(seed, num_tokens, hidden_size, sizes, dtype=dtype))


def check_packed(case):
    x, gates, *weights = case.inputs()
    packed = dsmoe_ext.pack_weights(*weights)

    ours = dsmoe_ext.sparse_ffn(x, gates, packed)
    plain = run_case(dsmoe_ext.sparse_ffn, case)["y"]
    exact = run_case(reference.sparse_ffn, case.to(torch.float64))["y"]
    error, plain_error = ((t.double() - exact).abs().sum() for t in (ours, plain))
    eps = torch.finfo(case.x.dtype).eps
    assert error <= 2 * plain_error + eps * exact.abs().sum()


@pytest.mark.quick
def test_strides_of_inputs_and_gradients(seed):
    case = random_case(seed, 24, 40, [16, 8, 24])
    wanted = run_case(dsmoe_ext.sparse_ffn, case)
    wide = torch.zeros(24, 100)
    wide[:, 10:50] = case.x
    for name, strided in {
        "x": wide[:, 10:50],
        "dy": case.dy.t().contiguous().t(),
        "gates": case.gates.t().contiguous().t(),
        "gate_proj": case.gate_proj.t().contiguous().t(),
        "down_proj_t": case.down_proj_t.t().contiguous().t(),
    }.items():
        assert torch.equal(strided, getattr(case, name))
        changed = case.to(torch.float32)
        setattr(changed, name, strided)
        for key, value in run_case(dsmoe_ext.sparse_ffn, changed).items():
            assert torch.equal(value, wanted[key]), (name, key)


@pytest.mark.quick
def test_expanded_input_and_gradient(seed):
    case = random_case(seed, 24, 40, [16, 8, 24])
    case.x, case.dy = case.x[:1].expand(24, 40), torch.ones(()).expand(24, 40)
    check_case(dsmoe_ext.sparse_ffn, case)


@pytest.mark.quick
def test_rows_further_apart_than_2_to_the_31(seed):
    case = random_case(seed, 3, 32, [16, 16], active=1.0, dtype=torch.bfloat16)
    apart = 2**30 + 64  # the third row starts beyond element 2^31; only touched pages are resident
    far = torch.empty(2 * apart + 32, dtype=torch.bfloat16).as_strided((3, 32), (apart, 1))
    far.copy_(case.x)
    x, *rest = case.inputs()
    assert torch.equal(dsmoe_ext.sparse_ffn(far, *rest), dsmoe_ext.sparse_ffn(x, *rest))


@pytest.mark.quick
@pytest.mark.parametrize("exact_ste", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "hidden_size", "sizes"),
    [(1, 576, [192] * 8), (2, 576, [192] * 8), (300, 96, [60, 4] + [16] * 8)],
    ids=["1 token", "2 tokens", "300 tokens"],
)
def test_same_bits_for_any_number_of_threads(
    num_tokens, hidden_size, sizes, dtype, exact_ste, seed
):
    case = random_case(seed, num_tokens, hidden_size, sizes, dtype=dtype, exact_ste=exact_ste)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 5):
            torch.set_num_threads(n)
            results.append(run_case(dsmoe_ext.sparse_ffn, case))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


@pytest.mark.quick
def test_gradcheck(seed):
    case = random_case(seed, 6, 5, [3, 0, 4, 2], dtype=torch.float64)
    leaves = [t.requires_grad_() for t in case.inputs()[:5]]
    # A finite difference at a gate of 0 makes the pair active: what ones in grad_weight stand for.
    assert torch.autograd.gradcheck(
        lambda *leaves: dsmoe_ext.sparse_ffn(
            *leaves, case.expert_offsets, grad_weight=torch.ones_like(case.gates)
        ),
        leaves,
    )


@pytest.mark.quick
@pytest.mark.parametrize("frozen", ["all weights", "x", "gates", "gate_proj", "down_proj_t"])
def test_gradients_that_nobody_needs(frozen, seed):
    case = random_case(seed, 30, 24, [12, 8])
    names = ["x", "gates", "gate_proj", "up_proj", "down_proj_t"]
    wanted = run_case(dsmoe_ext.sparse_ffn, case)
    without = names[2:] if frozen == "all weights" else [frozen]
    leaves = [
        t.clone().requires_grad_(n not in without)
        for n, t in zip(names, case.inputs()[:5], strict=True)
    ]
    dsmoe_ext.sparse_ffn(*leaves, case.expert_offsets).backward(case.dy)
    for name, leaf in zip(names, leaves, strict=True):
        if name in without:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, wanted[f"d{name}"]), name


@pytest.mark.quick
def test_nan_reaches_the_output_of_its_token_only(seed):
    case = random_case(seed, 20, 24, [12, 8], active=1.0)
    case.x[7, 3] = float("nan")
    case.gates[11, 1] = float("nan")
    rows = dsmoe_ext.sparse_ffn(*case.inputs()).isnan().any(1).nonzero().flatten()
    assert rows.tolist() == [7, 11]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, seed):
    case = random_case(seed, 12, 16, [8, 8, 4], active=1.0, dtype=dtype)
    leaves = [t.requires_grad_() for t in case.inputs()[:5]]
    op = torch.ops.dsmoe.expert_mlp.default
    weight = torch.ones_like(case.gates)
    for save in (False, True):
        torch.library.opcheck(op, (*leaves, case.expert_offsets, weight, 0, save, False))
    strided = (case.x.detach().t().contiguous().t().requires_grad_(), *leaves[1:])
    torch.library.opcheck(op, (*strided, case.expert_offsets, None, 0, False, False))
    packed = dsmoe_ext.pack_weights(*(t.detach() for t in leaves[2:]), case.expert_offsets)
    torch.library.opcheck(
        torch.ops.dsmoe.expert_mlp_packed.default,
        (case.x.detach(), case.gates.detach(), packed.data, case.expert_offsets, 16, 20, 0),
    )


def test_setting_of_tf32_compiles():
    """The CUDA path asks for it in every call."""
    compiled = torch.compile(lambda x: x * (2 if ops._allows_tf32() else 3), fullgraph=True)
    assert compiled(torch.ones(2)).tolist() == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_into_one_graph(dtype, seed):
    case = random_case(seed, 30, 24, [12, 8, 4], dtype=dtype)

    def layer(x, logits, *weights):
        gates, _ = dsmoe_ext.route(logits, 0.5, case.expert_offsets)
        return dsmoe_ext.sparse_ffn(x, gates, *weights, case.expert_offsets) * 2

    logits = torch.randn(30, 3)
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        leaves = [
            t.detach().clone().requires_grad_() for t in (case.x, logits, *case.inputs()[2:5])
        ]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, case.dy)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


BAD = {
    "x of three dimensions": (dict(x=torch.zeros(2, 3, 8)), r"x must have shape \[T, H\]"),
    "integer x": (dict(x=torch.zeros(4, 8).int()), "x must be float32, bfloat16"),
    "wrong hidden size": (
        dict(x=torch.zeros(4, 9)),
        "x has 9 columns, but the weights have hidden",
    ),
    "half gates": (dict(gates=torch.ones(4, 2).half()), "gates must be float32"),
    "gates for other tokens": (dict(gates=torch.ones(5, 2)), r"gates must have shape \[T, E\]"),
    "weights of two dtypes": (
        dict(up_proj=torch.zeros(6, 8).half()),
        "up_proj must have the dtype",
    ),
    "untransposed down_proj": (dict(down_proj_t=torch.zeros(8, 6)), r"must have shape \[6, 8\]"),
    "offsets too short": (dict(expert_offsets=offsets_of([6])), r"must have shape \[3\]"),
    "offsets too small": (dict(expert_offsets=offsets_of([2, 3])), "expert_offsets ends at 5, but"),
    "offsets descend": (dict(expert_offsets=torch.tensor([0, 7, 6]).int()), "never descend"),
    "offsets of int64": (dict(expert_offsets=offsets_of([2, 4]).long()), "must be int32"),
    "half grad_weight": (
        dict(grad_weight=torch.ones(4, 2).half()),
        "grad_weight must have the dtype of gates",
    ),
    "grad_weight shape": (dict(grad_weight=torch.ones(4, 3)), "grad_weight must have shape"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, message = BAD[name]
    arguments = dict(
        x=torch.zeros(4, 8),
        gates=torch.ones(4, 2),
        gate_proj=torch.zeros(6, 8, requires_grad=True),
        up_proj=torch.zeros(6, 8),
        down_proj_t=torch.zeros(6, 8),
        expert_offsets=offsets_of([2, 4]),
    )
    with pytest.raises(RuntimeError, match=message):
        dsmoe_ext.sparse_ffn(**{**arguments, **change}).sum().backward()


@pytest.mark.quick
def test_trace_with_gradients_can_be_saved(seed, tmp_path):
    x, gates, *weights = random_case(seed, 4, 8, [2, 4]).inputs()
    layer = torch.nn.Module()
    layer.forward = lambda x: dsmoe_ext.sparse_ffn(x, gates, *weights)
    x.requires_grad_()
    traced = torch.jit.trace(layer, x, check_trace=False)
    torch.jit.save(traced, tmp_path / "layer.pt")
    assert torch.equal(torch.jit.load(tmp_path / "layer.pt")(x), layer(x))


@pytest.mark.quick
def test_no_second_derivative(seed):
    x, *rest = random_case(seed, 4, 8, [2, 4]).inputs()
    y = dsmoe_ext.sparse_ffn(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="sparse_ffn can be differentiated once only"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.quick
def test_packed_errors(seed):
    case = random_case(seed, 4, 8, [2, 4])
    x, gates, *weights = case.inputs()
    packed = dsmoe_ext.pack_weights(*weights)
    with pytest.raises(RuntimeError, match="Packed weights are for inference"):
        dsmoe_ext.sparse_ffn(x.requires_grad_(), gates, packed)
    with pytest.raises(RuntimeError, match="but the packed weights are"):
        dsmoe_ext.sparse_ffn(x.detach().bfloat16(), gates, packed)
    foreign = packed.data.clone()
    foreign[-40:-16] = torch.tensor(list(b"avx1024".ljust(24, b"\0")), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="The weights were packed for avx1024"):
        dsmoe_ext.sparse_ffn(x.detach(), gates, replace(packed, data=foreign))
    with pytest.raises(RuntimeError, match="must be what pack_weights returned"):
        dsmoe_ext.sparse_ffn(x.detach(), gates, replace(packed, data=foreign[:5].clone()))
    with pytest.raises(TypeError, match="or all of"):
        dsmoe_ext.sparse_ffn(x, gates, weights[0])


@pytest.mark.quick
def test_packed_weights_are_a_copy(seed):
    case = random_case(seed, 4, 8, [2, 4])
    x, gates, *weights = case.inputs()
    packed = dsmoe_ext.pack_weights(*weights)
    before = dsmoe_ext.sparse_ffn(x, gates, packed)
    for tensor in weights:
        tensor.zero_()
    assert torch.equal(dsmoe_ext.sparse_ffn(x, gates, packed), before)

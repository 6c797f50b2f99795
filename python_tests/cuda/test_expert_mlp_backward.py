"""expert_mlp's backward on CUDA against dsmoe_ext.reference in float64 (design.md's edge table).

Half types in both main loops, mma.sync and that of sm_90a; a GPU runs its own."""

import pytest
import torch
from interpreted import Failed, Interpreter
from ops_under_test import ON_GPU, Ops, interpreter_only
from ptx import Counters
from test_expert_mlp import fine_experts

from dsmoe_ext import reference
from dsmoe_ext.testing import error_bounds, random_case

EDGES = {  # name: (T, H, sizes, active)
    "no token": (0, 16, [8, 8], 0.5),
    "one token": (1, 64, [32] * 4, 0.5),
    "none active": (9, 32, [16, 16], 0.0),
    "all active": (70, 64, [32] * 4, 1.0),
    "off every tile": (67, 56, [13, 29, 7, 1, 3], 0.5),
    "unequal": (129, 136, [100, 4, 60, 36], 0.4),
    "empty experts": (33, 48, [0, 20, 0, 12, 0], 0.6),
    "shared and fine": (65, 96, [96] + [16] * 18, 0.5),
    "large between fine": (40, 24, [16, 24, 80, 16, 0, 72, 8], 0.5),
    "one expert": (40, 32, [72], 1.0),
    "two chunks": (300, 40, [72, 40, 16], 0.5),
    "no hidden": (20, 0, [16, 72], 0.5),
    "no neuron": (20, 24, [0, 0, 0], 0.5),
    "one expert without neurons": (20, 24, [0], 1.0),
}


ARCHS = ["80"] if ON_GPU else ["80", "90a"]
in_both_loops = pytest.mark.parametrize("arch", ARCHS)
types_in_their_loops = pytest.mark.parametrize(
    "dtype, arch", [(torch.float32, "80"), *((torch.bfloat16, arch) for arch in ARCHS)], ids=str
)


def gradients(case, ops, **options):
    return ops.sparse_ffn_backward(
        *case.inputs(), dy=case.dy, grad_weight=case.grad_weight, **options
    )


def check(case, ops=None, bounds=None, **options):
    ours, bounds = gradients(case, ops or Ops(), **options), bounds or error_bounds(case)
    for name, result in ours.items():
        exact, bound = bounds[name]
        assert ((result.double() - exact).abs() <= bound).all(), name
    return ours


@in_both_loops
@pytest.mark.parametrize("exact_ste", [False, True], ids=["active", "exact"])
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge, exact_ste, arch):
    tokens, hidden, sizes, active = EDGES[edge]
    options = dict(active=active, exact_ste=exact_ste, dtype=torch.bfloat16)
    check(random_case(0, tokens, hidden, sizes, **options), Ops(arch=arch))


@in_both_loops
def test_experts_of_a_calibrated_model(arch):
    check(fine_experts(10), Ops(arch=arch))


@interpreter_only
def test_more_than_a_tile_of_sm_90a():
    """Of 256 rows, 160 and 192 columns, 512 tokens."""
    case = random_case(0, 530, 200, [264, 8], active=0.55, dtype=torch.bfloat16)
    check(case, Ops(arch="90a"))


@in_both_loops
@pytest.mark.parametrize("edge", ["off every tile", "shared and fine"])
def test_edges_in_float16(edge, arch):
    tokens, hidden, sizes, active = EDGES[edge]
    options = dict(active=active, exact_ste=True, dtype=torch.float16)
    check(random_case(1, tokens, hidden, sizes, **options), Ops(arch=arch))


@types_in_their_loops
@pytest.mark.parametrize("saved", [False, True], ids=["recomputed", "saved"])
def test_an_infinite_gate_meets_no_padding(saved, dtype, arch):
    """Experts are padded with zeros, of which infinity would make NaN."""
    case = random_case(14, 20, 16, [1, 9], active=1.0, dtype=dtype)
    for weights in (case.gate_proj, case.up_proj, case.down_proj_t, case.x, case.dy):
        weights.abs_()
    case.gates[3] = float("inf")
    out = gradients(case, Ops(arch=arch), save_activations=saved)
    assert (out["dx"][3] == float("inf")).all()


class Kept(torch.autograd.Function):
    """As fp16 holds it, whose largest number is 65504. The gradient is that of an identity."""

    @staticmethod
    def forward(ctx, v):
        return v.clamp(-65504, 65504)

    @staticmethod
    def backward(ctx, dv):
        return dv


def ffn_of_kept(x, gates, gate_proj, up_proj, down_proj_t, expert_offsets, *, grad_weight):
    """reference.sparse_ffn without inactive pairs' gradients, of g and u as they are kept."""
    g, u = (Kept.apply(x @ w.t()) for w in (gate_proj, up_proj))
    weights = reference.expand_experts(gates, expert_offsets).to(x.dtype)
    return (torch.nn.functional.silu(g) * u * weights) @ down_proj_t


@pytest.mark.parametrize("saved, arch", [(True, "80")] if ON_GPU else
                         [(True, "80"), (True, "90a"), (False, "90a")])  # fmt: skip
def test_activations_beyond_float16(saved, arch):
    """Where fp16 keeps g for the backward it keeps 65504 at most: no infinity, which would make NaN
    of the gradients."""
    case = random_case(13, 20, 32, [16, 40], active=1.0, dtype=torch.float16)
    case.gate_proj *= 1e5
    case.up_proj /= 10
    case.dy /= 1000
    assert (case.x.double() @ case.gate_proj.double().t()).abs().max() > 1e5
    bounds = error_bounds(case, ffn_of_kept)
    check(case, Ops(arch=arch), bounds, save_activations=saved)


@pytest.mark.parametrize("exact_ste", [False, True], ids=["active", "exact"])
@pytest.mark.parametrize(
    "edge",
    [
        "no token",
        "none active",
        "off every tile",
        "unequal",
        "large between fine",
        "no hidden",
        "no neuron",
    ],
)
def test_edges_in_float32(edge, exact_ste):
    tokens, hidden, sizes, active = EDGES[edge]
    options = dict(active=active, exact_ste=exact_ste, dtype=torch.float32)
    check(random_case(2, tokens, hidden, sizes, **options))


def test_float32_in_two_chunks():
    check(random_case(3, 300, 72, [72, 40, 16], exact_ste=True, dtype=torch.float32))


@types_in_their_loops
@pytest.mark.parametrize(
    "edge",
    [
        "no token",
        "one token",
        "off every tile",
        "unequal",
        "large between fine",
        "no hidden",
        "no neuron",
    ],
)
def test_saved_activations(edge, dtype, arch):
    """The forward keeps g and u of active pairs; of others nothing is read."""
    tokens, hidden, sizes, active = EDGES[edge]
    case = random_case(12, tokens, hidden, sizes, active=active, exact_ste=True, dtype=dtype)
    check(case, Ops(arch=arch), save_activations=True)


@interpreter_only
def test_saved_activations_make_nothing_ready_to_recompute():
    """Three widths of tiles, a kernel of each or two, and that of the weights. With a kernel go its
    maps of the weights."""
    case = random_case(12, 20, 16, [16], dtype=torch.bfloat16)

    def made_ready(act, **options):
        ops = Interpreter(arch="90a")
        act(ops, **options)
        return sum(name == "cudaFuncSetAttribute" for name, _ in ops.calls)

    def forward(ops):
        ops.sparse_ffn(*case.inputs(), save_activations=True)

    def backward(ops, **options):
        gradients(case, ops, without=("dx",), **options)

    assert made_ready(backward) == 3 * 2 + 1
    assert made_ready(backward, save_activations=True) - made_ready(forward) == 3 + 1


@in_both_loops
def test_sampled_grad_weight(arch):
    case = random_case(2, 50, 48, [20, 12, 16, 8], dtype=torch.bfloat16)
    draw = torch.rand(case.gates.shape, generator=torch.Generator().manual_seed(0)) < 0.25
    case.grad_weight = draw.to(case.gates) * 4.0
    ours = check(case, Ops(arch=arch))
    inactive = (case.gates == 0) & ~draw
    assert (ours["dgates"][inactive] == 0).all()


@in_both_loops
def test_an_expert_without_tokens_gets_zeros(arch):
    case = random_case(3, 30, 24, [16, 72, 8], active=1.0, dtype=torch.bfloat16)
    case.gates[:, 1] = 0
    out = gradients(case, Ops(arch=arch))
    for name in ("dgate_proj", "dup_proj", "ddown_proj_t"):
        assert (out[name][16:88] == 0).all() and (out[name][:16] != 0).any()


@in_both_loops
def test_rows_of_x_and_dy_further_apart(arch):
    case = random_case(4, 24, 40, [16, 8, 72], dtype=torch.bfloat16)
    want = gradients(case, Ops(arch=arch))
    wide = torch.zeros(24, 192, dtype=torch.bfloat16)
    wide[:, 16:56], wide[:, 104:144] = case.x, case.dy
    case.x, case.dy = wide[:, 16:56], wide[:, 104:144]
    got = gradients(case, Ops(arch=arch))
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_rows_further_apart_than_2_to_the_31():
    case = random_case(11, 17, 32, [16, 72], active=1.0, dtype=torch.bfloat16)
    want = gradients(case, Ops())
    far = torch.empty(2**31 + 17 * 64, dtype=torch.bfloat16)  # only touched pages exist
    far_rows = far.as_strided((17, 32), (2**27 + 64, 1))
    case.x, case.dy = (
        far_rows.as_strided(far_rows.shape, far_rows.stride(), i * 32).copy_(t)
        for i, t in enumerate((case.x, case.dy))
    )
    got = gradients(case, Ops())
    assert all(torch.equal(got[n], want[n]) for n in want)


@in_both_loops
def test_what_nobody_wants(arch):
    case = random_case(5, 20, 24, [16, 40], dtype=torch.bfloat16, exact_ste=True)
    want = gradients(case, Ops(arch=arch))
    for without in (("dx",), ("dgates",), ("dgate_proj", "dup_proj", "ddown_proj_t")):
        got = gradients(case, Ops(arch=arch), without=without)
        assert set(got) == set(want) - set(without)
        assert all(torch.equal(got[n], want[n]) for n in got)


@in_both_loops
def test_infinity_at_an_inactive_pair_stays_there(arch):
    case = random_case(6, 17, 16, [8, 24], active=1.0, exact_ste=True, dtype=torch.bfloat16)
    case.gates[5] = 0
    case.x[5] = 1e30
    out = gradients(case, Ops(arch=arch))
    assert (out["dx"][5] == 0).all()
    assert all(out[n].isfinite().all() for n in ("dgate_proj", "dup_proj", "ddown_proj_t"))


@interpreter_only
@in_both_loops
def test_same_bits_for_any_schedule_and_number_of_multiprocessors(arch):
    case = random_case(7, 90, 72, [72, 16, 16], dtype=torch.bfloat16, exact_ste=True)
    want = gradients(case, Interpreter(arch=arch))
    for seed, multiprocessors in ((None, 1), (0, 3), (1, 2)):
        ops = Interpreter(arch=arch, seed=seed, multiprocessors=multiprocessors)
        got = gradients(case, ops)
        assert all(torch.equal(got[n], want[n]) for n in want)


@interpreter_only
@in_both_loops
def test_traffic(arch):
    """No bank conflicts; copies and stores of whole sectors, but for the parts of dgates."""
    case = random_case(9, 128, 128, [128, 64, 32], active=1.0, dtype=torch.bfloat16)
    counters = Counters()
    gradients(case, Interpreter(arch=arch, counters=counters))
    assert counters.total(counters.cycles).excess == 0
    copies, stores = (
        counters.total({k: v for k, v in counters.sectors.items() if k[1] == op})
        for op in ("cp", "st")
    )
    assert copies.units == copies.least
    parts_of_dgates = 128 * (4 + 2 + 1)
    assert stores.units <= 1.02 * stores.least + parts_of_dgates


@interpreter_only
def test_float32_under_any_schedule_and_without_bank_conflicts():
    case = random_case(7, 70, 72, [72, 16, 16], dtype=torch.float32, exact_ste=True)
    counters = Counters()
    want = gradients(case, Interpreter(counters=counters))
    assert counters.total(counters.cycles).excess == 0
    for seed, multiprocessors in ((0, 1), (1, 3)):
        got = gradients(case, Interpreter(seed=seed, multiprocessors=multiprocessors))
        assert all(torch.equal(got[n], want[n]) for n in want)


@interpreter_only
@pytest.mark.parametrize("hidden, sizes", [(20, [8]), (24, [1] * 2049)], ids=["H", "E"])
def test_what_is_not_supported_says_so(hidden, sizes):
    with pytest.raises(Failed, match="kUnsupported"):
        gradients(random_case(10, 4, hidden, sizes, dtype=torch.bfloat16), Interpreter())

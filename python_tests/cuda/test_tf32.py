"""float32 in TF32, where torch.backends.cuda.matmul allows it: forward and backward."""

import pytest
import torch
from ops_under_test import ON_GPU, Ops, interpreter_only
from ptx import Counters
from test_expert_mlp_backward import EDGES, gradients

from dsmoe_ext import reference
from dsmoe_ext.testing import magnitudes, random_case, run_case

EPS = 2.0**-10  # of numbers with 10 bits


@pytest.fixture
def make():
    """Ops under test that may use TF32."""
    if ON_GPU:
        torch.backends.cuda.matmul.allow_tf32 = True
        yield Ops
        torch.backends.cuda.matmul.allow_tf32 = False
    else:
        yield type("Tf32", (Ops,), {"allow_tf32": True})


def expect(case, function=reference.sparse_ffn):
    """What exact arithmetic makes of a case, and the sums of absolute values behind it."""
    return run_case(function, case.to(torch.float64)), magnitudes(case)


def forward_and_backward(case, ops, save_activations):
    results = gradients(case, ops, save_activations=save_activations)
    return results | {"y": ops.sparse_ffn(*case.inputs())}


def check(results, expected):
    """Errors are as large as the rounding of the factors, and no larger: no element's, and those of
    all elements together, whose signs vary."""
    exact, largest = expected
    for name, result in results.items():
        error = (result.double() - exact[name]).abs()
        assert (error <= 8 * EPS * largest[name]).all(), name
        assert error.norm() <= EPS * exact[name].norm(), f"{name} as a whole"


@pytest.mark.parametrize("save", [False, True], ids=["recompute", "save"])
@pytest.mark.parametrize(
    "edge", ["no token", "off every tile", "unequal", "large between fine", "none active"]
)
def test_edges(edge, save, make):
    tokens, hidden, sizes, active = EDGES[edge]
    case = random_case(5, tokens, hidden, sizes, active=active, exact_ste=True)
    expected = exact, largest = expect(case)
    results = forward_and_backward(case, make(), save)
    check(results, expected)
    for name, magnitude in largest.items():
        if tokens and (active or name == "dgates"):
            error = (results[name].double() - exact[name]).abs()
            assert (error > 8 * 2.0**-23 * magnitude).any(), f"{name} was not rounded"


@interpreter_only
def test_any_schedule_and_no_bank_conflicts(make):
    case = random_case(4, 70, 72, [72, 16, 16], exact_ste=True)
    counters = Counters()
    ops = make(counters=counters)
    want = gradients(case, ops) | {"y": ops.sparse_ffn(*case.inputs())}
    assert counters.instructions["mma"] > 0
    assert counters.total(counters.cycles).excess == 0
    ops = make(seed=0, multiprocessors=1)
    got = gradients(case, ops) | {"y": ops.sparse_ffn(*case.inputs())}
    assert all(torch.equal(got[n], want[n]) for n in want)


@interpreter_only
@pytest.mark.parametrize("allow_tf32", [False, True])
def test_traffic(allow_tf32):
    """No bank conflicts; whole sectors, but for the parts of dgates and for look-ups."""
    case = random_case(6, 64, 32, [64, 128], active=1.0)
    counters = Counters()
    ops = Ops(counters=counters)
    ops.allow_tf32 = allow_tf32
    gradients(case, ops, save_activations=True)
    assert counters.total(counters.cycles).excess == 0
    moved = {
        op: counters.total({k: v for k, v in counters.sectors.items() if k[1] == op})
        for op in ("ld", "st")
    }
    assert moved["ld"].units <= 1.1 * moved["ld"].least
    parts_of_dgates = 64 * (2 + 4)
    assert moved["st"].units <= 1.02 * moved["st"].least + parts_of_dgates

"""router.cu and router_bwd.cu: x W^T + b and its gradients in float32, against float64."""

import pytest
import torch
from interpreted import SMALL, Failed, Interpreter
from ops_under_test import Ops, interpreter_only
from ptx import Counters

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps
EDGES = [  # (T, R, H)
    (0, 8, 64), (0, 5, 8), (1, 1, 8), (1, 8, 1000), (1, 517, 64), (2, 7, 576), (5, 9, 0),
    (5, 64, 136), (17, 8, 1000), (17, 517, 8), (130, 8, 64), (130, 64, 8), (130, 1, 576),
    (200, 17, 264), (3, 0, 16),
]  # fmt: skip


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def setting(tokens, routed, hidden, dtype=torch.float32):
    """x, weight, bias, dlogits"""
    x, weight = numbers(0, tokens, hidden).to(dtype), numbers(1, routed, hidden)
    return x, weight, numbers(2, routed), numbers(3, tokens, routed)


def check_sum(got, product, a, b, extra=None):
    """|error| <= 8 eps times the sum of the products' magnitudes, and a rounding to got's dtype."""
    a, b = a.double(), b.double()
    want, size = product(a, b), product(a.abs(), b.abs())
    if extra is not None:
        want, size = want + extra.double(), size + extra.double().abs()
    assert got.shape == want.shape
    kind = torch.finfo(got.dtype)
    rounding = kind.eps * want.abs().clamp(min=kind.tiny) if got.dtype != torch.float32 else 0
    assert ((got.double() - want).abs() <= 8 * EPS * size + rounding).all()


def check(x, weight, bias, dlogits, make=Ops):
    logits = make().router(x, weight, bias)
    check_sum(logits, lambda a, b: a @ b.t(), x, weight, bias)
    dx, dweight = make().router_backward(dlogits, x, weight)
    assert dx.dtype == x.dtype
    check_sum(dx, lambda a, b: a @ b, dlogits, weight)
    check_sum(dweight, lambda a, b: a.t() @ b, dlogits, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", EDGES, ids=str)
def test_against_float64(shape, dtype):
    check(*setting(*shape, dtype))


@pytest.mark.parametrize("shape", [(1, 8, 64), (40, 9, 64)], ids=str)
def test_without_bias(shape):
    x, weight, _, dlogits = setting(*shape)
    check(x, weight, None, dlogits)


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(130, 17, 264), (70, 8, 136), (260, 1, 24)], ids=str)
def test_many_tiles(shape, dtype):
    """A warp each, where chips are small; the sum over tokens is cut into few parts."""
    check(*setting(*shape, dtype), lambda: Interpreter(**SMALL))


def test_many_tiles_on_a_large_chip():
    """The first size that gives every warp a tile of its own."""
    check(*setting(136, 481, 8, torch.bfloat16))


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_what_is_not_wanted_is_not_made(wanted):
    x, weight, _, dlogits = setting(70, 9, 40)
    both, some = (Ops().router_backward(dlogits, x, weight, *w) for w in ((True, True), wanted))
    for result, want, is_wanted in zip(some, both, wanted, strict=True):
        assert torch.equal(result, want) if is_wanted else result is None


@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_a_token_has_the_same_bits_among_others(tokens):
    x, weight, bias, dlogits = setting(64, 20, 264, torch.bfloat16)
    want = Ops().router(x, weight, bias)
    assert torch.equal(Ops().router(x[:tokens], weight, bias), want[:tokens])
    want, _ = Ops().router_backward(dlogits, x, weight)
    got, _ = Ops().router_backward(dlogits[:tokens], x[:tokens], weight)
    assert torch.equal(got, want[:tokens])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_further_apart(dtype):
    x, weight, bias, dlogits = setting(19, 9, 40, dtype)
    wide = torch.full((19, 72), float("nan"), dtype=dtype)
    wide[:, 16:56] = x
    for got, want in zip(
        (Ops().router(wide[:, 16:56], weight, bias),
         *Ops().router_backward(dlogits, wide[:, 16:56], weight)),
        (Ops().router(x, weight, bias), *Ops().router_backward(dlogits, x, weight)),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(got, want)


def test_rows_further_apart_than_2_to_the_31():
    """The last row starts beyond element 2^31; only the pages that are touched exist."""
    x, weight, bias, dlogits = setting(3, 9, 32, torch.bfloat16)
    apart = 2**30 + 64
    far = torch.empty(2 * apart + 32, dtype=x.dtype).as_strided((3, 32), (apart, 1)).copy_(x)
    assert torch.equal(Ops().router(far, weight, bias), Ops().router(x, weight, bias))
    got, want = (Ops().router_backward(dlogits, rows, weight)[1] for rows in (far, x))
    assert torch.equal(got, want)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_where_they_belong(value):
    x, weight, bias, dlogits = setting(20, 9, 40)
    x[7, 3], dlogits[11, 2] = value, value
    logits = Ops().router(x, weight, bias)
    dx, dweight = Ops().router_backward(dlogits, x, weight)
    assert (~logits.isfinite()).any(1).nonzero().flatten().tolist() == [7]
    assert (~dx.isfinite()).any(1).nonzero().flatten().tolist() == [11]
    wrong = torch.zeros(9, 40, dtype=torch.bool)
    wrong[2], wrong[:, 3] = True, True
    assert torch.equal(~dweight.isfinite(), wrong)


@interpreter_only
@pytest.mark.parametrize("settings", [{}, SMALL], ids=["large chip", "small"])
def test_any_schedule(settings):
    x, weight, bias, dlogits = setting(130, 9, 136, torch.bfloat16)
    results = []
    for seed in (None, 0, 1):
        ops = Interpreter(seed=seed, **settings)
        results.append((ops.router(x, weight, bias), *ops.router_backward(dlogits, x, weight)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@interpreter_only
@pytest.mark.parametrize("arch", ["90", "120"])
def test_other_architectures(arch):
    """What nvcc makes for them differs in places; the results may not."""
    x, weight, bias, dlogits = setting(20, 9, 136, torch.bfloat16)
    results = []
    for ops in (Interpreter(), Interpreter(arch=arch)):
        results.append((ops.router(x, weight, bias), *ops.router_backward(dlogits, x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreter_only
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("settings", [{}, SMALL], ids=["large chip", "small"])
def test_traffic(settings, dtype):
    """No bank conflicts; x and W come, and gradients go, in whole sectors, as often as a tile needs
    them. Logits go two at a time, dz comes four rows at a time: half sectors, of small matrices."""
    x, weight, bias, dlogits = setting(128, 16, 256, dtype)
    counters = Counters()
    ops = Interpreter(counters=counters, **settings)
    ops.router(x, weight, bias)
    of_bias = 128 // 8 * 16 // 8 * 2
    x_and_weight = 16 // 8 * x.nbytes + 128 // 8 * weight.nbytes
    assert moved(counters, "ld").units == x_and_weight // 32 + of_bias
    assert moved(counters, "st").units == 2 * 128 * 16 * 4 // 32

    counters = Counters()
    ops = Interpreter(counters=counters, **settings)
    dx, _ = ops.router_backward(dlogits, x, weight, True, False)
    assert moved(counters, "ld", "router.cuh").units == 128 // 16 * weight.nbytes // 32
    assert moved(counters, "st").units == dx.nbytes // 32
    ops.router_backward(dlogits, x, weight)
    stores = moved(counters, "st")
    assert stores.units == stores.least
    assert counters.total(counters.cycles).excess == 0


def moved(counters, op, file=""):
    """Sectors of global memory."""
    return counters.total(
        {k: v for k, v in counters.sectors.items() if k[1] == op and file in k[0]}
    )


@interpreter_only
@pytest.mark.parametrize("tokens", [1, 8192, 2**20])
@pytest.mark.parametrize("routed, hidden", [(1, 8), (8, 4096), (517, 4096), (2048, 8192)])
def test_workspace_is_bounded(routed, hidden, tokens):
    assert Interpreter().router_workspace(tokens, routed, hidden) <= 32 << 20


@interpreter_only
def test_what_is_not_supported_says_so():
    x, weight, _, dlogits = setting(3, 2, 20)
    with pytest.raises(Failed, match="kUnsupported"):
        Interpreter().router(x, weight)
    with pytest.raises(Failed, match="kUnsupported"):
        Interpreter().router_backward(dlogits, x, weight)

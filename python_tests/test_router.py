"""The op `router`: x W^T + b in float32 for x of any dtype, on few tokens and on many."""

import pytest
import torch

from dsmoe_ext.router_op import router_logits

pytestmark = pytest.mark.quick
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def setting(num_tokens, hidden_size, num_routed, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(num_tokens, hidden_size).to(dtype)
    weight = torch.randn(num_routed, hidden_size, dtype=wide)
    return x, weight, torch.randn(num_routed, dtype=wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 4, 5, 24, 25, 61])
@pytest.mark.parametrize("sizes", [(1, 1), (17, 3), (64, 32), (130, 73), (48, 1)])
def test_against_float64(dtype, num_tokens, sizes, seed):
    """Each of H roundings is below eps times the sum of absolute products."""
    x, weight, bias = setting(num_tokens, *sizes, dtype)
    for b in (bias, None):
        got = router_logits(x, weight, b)
        exact = x.double() @ weight.double().t() + (0 if b is None else b.double())
        size = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
        assert got.dtype == weight.dtype and got.shape == exact.shape
        eps = torch.finfo(got.dtype).eps
        assert ((got - exact).abs() <= eps * (sizes[0] + 1) ** 0.5 * 2 * size).all()


@pytest.mark.parametrize("num_tokens", [3, 50])
def test_strides_and_threads(num_tokens, seed):
    x, weight, bias = setting(num_tokens, 200, 300, torch.bfloat16)
    want = router_logits(x, weight, bias)
    wide = torch.zeros(num_tokens, 207, dtype=x.dtype)
    wide[:, 3:203] = x
    assert torch.equal(router_logits(wide[:, 3:203], weight, bias), want)
    assert torch.equal(router_logits(x.t().contiguous().t(), weight, bias), want)
    assert torch.equal(router_logits(x, weight.t().contiguous().t(), bias), want)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(router_logits(x, weight, bias), want)
    finally:
        torch.set_num_threads(threads)


def test_gradients(seed):
    inputs = [t.requires_grad_() for t in setting(7, 9, 5, torch.float64)]
    assert torch.autograd.gradcheck(router_logits, inputs)
    assert torch.autograd.gradgradcheck(router_logits, inputs)
    torch.library.opcheck(torch.ops.dsmoe.router.default, tuple(inputs))
    dlogits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    for wanted in ((True, True), (True, False), (False, True)):
        args = (dlogits, *inputs[:2], *wanted)
        torch.library.opcheck(torch.ops.dsmoe.router_backward.default, args)
    x, weight, bias = (t.requires_grad_() for t in setting(7, 9, 5, torch.bfloat16))
    router_logits(x, weight, bias).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32


def test_gradients_under_autocast(seed):
    inputs = [t.requires_grad_() for t in setting(7, 16, 5, torch.float32)]
    logits = router_logits(*inputs)
    want = torch.autograd.grad(logits.sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(logits.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_errors(seed):
    x, weight, bias = setting(5, 8, 3, torch.bfloat16)
    with pytest.raises(RuntimeError, match="weight must be float32, or float64 if x is"):
        router_logits(x, weight.bfloat16())
    with pytest.raises(RuntimeError, match="bias must have the dtype"):
        router_logits(x, weight, bias.double())
    with pytest.raises(RuntimeError, match=r"do not fit: .* \[5, 8\] and \[3, 7\]"):
        router_logits(x, weight[:, 1:])

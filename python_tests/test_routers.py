"""Routers: their formulas, and that they stay in float32."""

import pytest
import torch

from dsmoe_ext.routers import LinearRouter

pytestmark = pytest.mark.quick
KINDS = {"linear": False, "modse": True}  # with noise


def make(kind="linear", bias=True, dtype=None):
    return LinearRouter(12, [4] * 5, bias=bias, noise=KINDS[kind], dtype=dtype)


def test_linear(seed):
    router = make(dtype=torch.float64)
    torch.nn.init.normal_(router.bias)
    x = torch.randn(7, 12, dtype=torch.float64)
    torch.testing.assert_close(router(x), x @ router.weight.t() + router.bias)


def test_modse(seed):
    """H(x) = x Wg + RMSNorm(softplus(x Wn)), with a learnable gain."""
    router = make("modse", bias=False, dtype=torch.float64)
    torch.nn.init.normal_(router.noise_gain)
    x = torch.randn(7, 12, dtype=torch.float64)
    noise = torch.log1p(torch.exp(x @ router.noise_weight.t()))
    noise = noise / noise.square().mean(1, keepdim=True).sqrt() * router.noise_gain
    torch.testing.assert_close(router(x), x @ router.weight.t() + noise)


@pytest.mark.parametrize("kind", KINDS)
def test_no_linear_layer(kind):
    """Quantisers and LoRA's "all-linear" take every nn.Linear: a router keeps its own weights."""
    router = make(kind)
    assert not any(isinstance(module, torch.nn.Linear) for module in router.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("logit", [0.0, 1.25, None])
def test_start(kind, logit, seed):
    router = make(kind)
    router.start_logit = logit
    router.reset_parameters()
    logits = router(torch.randn(30, 12))
    if logit is None:
        assert logits.std() > 0.01
    else:
        assert torch.equal(logits, torch.full((30, 5), logit))
        router(torch.randn(3, 12)).square().sum().backward()
        if logit:  # it learns from there
            assert all(
                p.grad.abs().sum() > 0 for n, p in router.named_parameters() if n != "noise_weight"
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_throughout(kind, dtype, seed):
    router = make(kind, dtype=dtype)
    assert {p.dtype for p in router.to(dtype).parameters()} == {torch.float32}
    x = torch.randn(7, 12)
    with torch.autocast("cpu", dtype=dtype):
        logits = router(x)
    assert torch.equal(logits, router(x)) and logits.dtype == torch.float32
    assert torch.equal(router(x.to(dtype)), router(x.to(dtype).float()))
    assert {p.dtype for p in router.double().parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_weights_that_others_cast(kind, bias, seed):
    """As FSDP2 does with MixedPrecisionPolicy(param_dtype=...): the logits are float32 still."""
    router = make(kind, bias=bias)
    x = torch.randn(7, 12).bfloat16()
    cast = {name: p.detach().bfloat16() for name, p in router.named_parameters()}
    logits = torch.func.functional_call(router, cast, x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, router(x), rtol=0.05, atol=0.05)

"""routed_ffn gives the bits of its three steps."""

import pytest
import torch

import dsmoe_ext
from dsmoe_ext import DSMoEFFN, ops, reference
from dsmoe_ext.router_op import router_logits
from dsmoe_ext.testing import random_case

pytestmark = pytest.mark.quick
SIZES = [24, 8, 8, 4]  # the first is shared


def setting(seed, dtype, num_tokens=5):
    case = random_case(seed, num_tokens, 16, SIZES, dtype=dtype)
    x, _, *weights = case.inputs()
    router_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    router = torch.randn(3, 16, dtype=router_dtype), torch.randn(3, dtype=router_dtype)
    return x, router, torch.tensor(0.5), weights[3], dsmoe_ext.pack_weights(*weights)


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
@pytest.mark.parametrize("method", reference.METHODS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_same_bits_as_the_three_steps(dtype, method, num_tokens, seed):
    x, router, threshold, offsets, packed = setting(seed, dtype, num_tokens)
    options = dict(method=method, top_k=2, gates="scores", rescale=True, gate_scale=1.5)
    y, gates = ops.routed_ffn(x, *router, threshold, packed, **options)
    wanted, _ = dsmoe_ext.route(router_logits(x, *router), threshold, offsets, **options)
    assert torch.equal(gates, wanted)
    assert torch.equal(y, dsmoe_ext.sparse_ffn(x, wanted, packed))


def test_without_bias_and_opcheck(seed):
    x, (weight, _), threshold, offsets, packed = setting(seed, torch.float32)
    _, gates = ops.routed_ffn(x, weight, None, threshold, packed)
    logits = router_logits(x, weight)
    assert torch.equal(gates, dsmoe_ext.route(logits, threshold, offsets).gates)
    arguments = (x, weight, None, threshold, packed.data, offsets, 16, sum(SIZES))
    options = (0, 0, 0, False, True, 1.0)  # activation, method, top_k, binary, rescale, gate_scale
    torch.library.opcheck(torch.ops.dsmoe.routed_ffn.default, (*arguments, *options))


def test_errors(seed):
    x, (weight, bias), threshold, _, packed = setting(seed, torch.float32)
    with pytest.raises(RuntimeError, match=r"do not fit: they have shapes \[5, 16\] and \[3, 15\]"):
        ops.routed_ffn(x, weight[:, 1:], bias, threshold, packed)
    with pytest.raises(RuntimeError, match=r"the router's bias must have shape \[3\]"):
        ops.routed_ffn(x, weight, bias[1:], threshold, packed)
    with pytest.raises(RuntimeError, match="Packed weights are for inference"):
        ops.routed_ffn(x, weight.requires_grad_(), bias, threshold, packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_module_takes_it(dtype, seed, monkeypatch):
    ffn = DSMoEFFN(16, 44, 4, shared_size=12, router_init="paper", dtype=dtype).eval().pack()
    x = torch.randn(2, 3, 16).to(dtype)
    with torch.no_grad():
        y = ffn(x)
        monkeypatch.setattr(DSMoEFFN, "_pack_for_routing", lambda self, tokens: None)
        assert torch.equal(ffn(x), y)

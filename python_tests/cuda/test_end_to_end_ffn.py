"""DSMoEFFN end to end on the CUDA kernels: see end_to_end.py."""

import pytest
import torch
from end_to_end import check, numbers
from interpreted import STREAM
from on_cuda_kernels import cuda_kernels
from ops_under_test import interpreter_only

from dsmoe_ext import DSMoEFFN

HALF = [torch.bfloat16, torch.float16]
METHODS = {
    "threshold, exact": {"ste": "exact", "shared_size": 16},
    "threshold, sampled": {"ste": "sampled", "sample_prob": 0.5, "expert_sizes": [8, 40, 3, 29]},
    "top_p": {"method": "top_p", "threshold": 0.6, "ste": "exact", "shared_size": 16},
    "top_k": {"method": "top_k", "top_k": 2, "shared_size": 16},
    "relu, modse": {"method": "relu", "router": "modse"},
}


def random_ffn(dtype, **options):
    """H 32, I 80, four routed experts, a router whose masks are mixed."""
    ffn = DSMoEFFN(32, 80, 4, **{"router_init": "paper", "router_bias": True, "seed": 0} | options)
    with torch.no_grad():
        for seed, parameter in enumerate(ffn.parameters()):
            parameter.copy_(numbers(seed, *parameter.shape) * 0.3)
    return ffn.to(dtype)


def train(tokens, dtype, autocast=None):
    def run(ffn, device):
        own = ffn.gate_proj.weight.dtype
        x, dy = (numbers(s, 2, tokens // 2, 32).to(dtype).to(device, own) for s in (10, 11))
        x.requires_grad_()
        with torch.autocast(device, autocast, enabled=autocast is not None and own != torch.double):
            y = ffn(x)
        names, leaves = zip(("x", x), *ffn.named_parameters(), strict=True)
        gradients = torch.autograd.grad(y, leaves, dy.to(y.dtype))
        counts = ffn.activity.totals()
        return {"y": y.detach(), "counts": counts, **dict(zip(names, gradients, strict=True))}

    return run


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_ffn_trains(method, dtype):
    check(train(40, dtype), random_ffn(dtype, **METHODS[method]))


@pytest.mark.parametrize("tokens", [2, 40])
def test_ffn_trains_on_hopper(tokens):
    check(train(tokens, torch.bfloat16), random_ffn(torch.bfloat16, ste="exact"), "90a")


def test_ffn_trains_under_autocast():
    check(train(40, torch.float32, torch.bfloat16), random_ffn(torch.float32, ste="exact"))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_ffn_infers(tokens, dtype):
    """No gradients: up to 16 tokens go the way of decoding."""

    @torch.inference_mode()
    def run(ffn, device):
        x = numbers(12, tokens, 32).to(dtype).to(device, ffn.gate_proj.weight.dtype)
        return {"y": ffn(x), "counts": ffn.activity.totals()}

    for method in METHODS.values():
        check(run, random_ffn(dtype, **method).eval())


@interpreter_only
def test_where_it_ran():
    """All kernels on torch's current stream; outside of the context none."""
    ffn, x = random_ffn(torch.bfloat16), numbers(12, 3, 32).bfloat16()
    with cuda_kernels() as ops:
        ffn(x).sum().backward()
    launches = len(ops.launches)
    ffn(x).sum().backward()
    assert len(ops.launches) == launches > 0
    assert {stream for name, stream in ops.calls if name == "cudaLaunchKernel"} == {STREAM}

"""What the bindings do on CUDA with inputs that the kernels can't take as they are: they copy, or
they say in one sentence what must change. See end_to_end.py."""

import functools

import pytest
import torch
from end_to_end import cuda, numbers

from dsmoe_ext import build_info, ops
from dsmoe_ext.router_op import router_logits
from dsmoe_ext.testing import random_case, run_case

MOST = build_info()["max_cuda_experts"]


def strided(tensor):
    """In a wider matrix, whose rows are an odd number of elements apart."""
    wide = tensor.new_zeros(len(tensor), tensor.shape[1] + 5)
    wide[:, 3:-2] = tensor
    return wide[:, 3:-2]


def misaligned(tensor):
    """Contiguous, but one element behind where memory begins."""
    return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)


VIEWS = {
    "odd strides": strided,
    "misaligned": misaligned,
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "aligned strides, misaligned": lambda tensor: torch.cat(
        [tensor.new_zeros(len(tensor), 1), tensor, tensor.new_zeros(len(tensor), 7)], 1
    )[:, 1:-7],
}


def on(device, case):
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            setattr(case, name, value.to(device))
    return case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_are_copied(view, dtype):
    def of_views(x, gates, gate_proj, up_proj, down_proj_t, expert_offsets, **options):
        tensors = map(view, (x, gates, gate_proj, up_proj, down_proj_t))
        return ops.sparse_ffn(*tensors, expert_offsets, **options)

    case = random_case(0, 20, 32, [16, 24, 8], exact_ste=True, dtype=dtype)
    with cuda() as device:
        expected = run_case(ops.sparse_ffn, on(device, case))
        case.dy = view(case.dy)
        found = run_case(of_views, case)
    for name, want in expected.items():
        assert torch.equal(found[name], want), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_are_copied_for_the_router(view, dtype):
    def run(device, view):
        x, weight = numbers(0, 20, 32).to(device, dtype), numbers(1, 5, 32).to(device)
        leaves = [x.requires_grad_(), weight.requires_grad_()]
        logits = router_logits(view(x), view(weight), numbers(2, 5).to(device))
        return logits, *torch.autograd.grad(logits, leaves, view(numbers(3, 20, 5).to(device)))

    with cuda() as device:
        for found, want in zip(run(device, view), run(device, lambda t: t), strict=True):
            assert torch.equal(found, want)


def test_the_routers_second_derivatives():
    def run(device, dtype):
        leaves = [numbers(n, n, 16).to(device, dtype).requires_grad_() for n in (20, 5)]
        logits = router_logits(*leaves)
        first = torch.autograd.grad(logits.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    with cuda() as device:
        found = run(device, torch.float32)
    for got, want in zip(found, run("cpu", torch.float64), strict=True):
        assert (got.cpu() - want).abs().max() <= 1e-5 * want.abs().max()


def test_an_expanded_gradient():
    case = random_case(0, 20, 32, [16, 24], exact_ste=True, dtype=torch.bfloat16)
    case.dy = torch.ones(20, 32, dtype=torch.bfloat16)
    with cuda() as device:
        expected = run_case(ops.sparse_ffn, on(device, case))
        case.dy = case.dy[:1, :1].expand(20, 32)
        found = run_case(ops.sparse_ffn, case)
    for name, want in expected.items():
        assert torch.equal(found[name], want), name


def refused(call, match):
    with pytest.raises(RuntimeError, match=match) as error:
        call()
    sentence = str(error.value).splitlines()[0]
    assert sentence.count(". ") == 0 and sentence.endswith(".")


def test_limits_are_named():
    def sparse_ffn(hidden, sizes, dtype):
        case = random_case(0, 3, hidden, sizes, dtype=dtype)
        return lambda: ops.sparse_ffn(*(tensor.to(device) for tensor in case.inputs()))

    many = [1] * (MOST + 1)
    offsets = torch.tensor([0, 8, 16], dtype=torch.int32)
    with cuda() as device:
        refused(sparse_ffn(36, [16], torch.bfloat16), "multiple of 8, but it is 36: pad")
        refused(sparse_ffn(32, [16], torch.float64), "x is float64, which runs on the CPU only")
        refused(sparse_ffn(8, many, torch.float32), f"at most {MOST} experts a layer, but there")
        gates = torch.ones(2, MOST + 1, device=device)
        refused(lambda: ops.permute(gates), f"at most {MOST} experts a layer, but there are")
        refused(
            lambda: ops.permute(gates[:, :3].double()), "gates is float64, which runs on the CPU"
        )
        for hidden, dtype, match in (
            (36, torch.float32, "multiple of 8, but it is 36: pad"),
            (32, torch.float64, "x is float64, which runs on the CPU"),
        ):
            x, weight = (numbers(0, n, hidden).to(device, dtype) for n in (3, 2))
            refused(functools.partial(router_logits, x, weight), match)
        logits = numbers(0, 5, 2).double().to(device)
        refused(lambda: ops.route(logits, 0.5, offsets.to(device)), "logits is float64, which runs")


def test_packed_weights_are_for_the_cpu():
    case = random_case(0, 3, 32, [16, 24])
    packed = ops.pack_weights(*case.inputs()[2:])
    with cuda() as device:
        x, gates, *weights = (tensor.to(device) for tensor in case.inputs())
        refused(
            lambda: ops.pack_weights(*weights), "pack_weights is for the CPU; CUDA kernels read"
        )
        refused(lambda: ops.sparse_ffn(x, gates, packed), "packed weights are for the CPU")

"""The activations of a gate, value and derivative, through sparse_ffn (dsmoe_ext.testing)."""

import math
from dataclasses import replace

import pytest
import torch

import dsmoe_ext
from dsmoe_ext.reference import ACTIVATIONS
from dsmoe_ext.testing import check_case, random_case, run_case

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.quick
@pytest.mark.parametrize("num_tokens, sizes", [(1, [32] * 4), (67, [13, 29, 7, 1, 3]), (5, [40])])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, num_tokens, sizes, seed):
    case = random_case(seed, num_tokens, 61, sizes, dtype=dtype, exact_ste=True)
    case.activation = activation
    check_case(dsmoe_ext.sparse_ffn, case)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_packed_and_recomputed(activation, dtype, seed):
    case = random_case(seed, 9, 40, [20, 12, 16], dtype=dtype, exact_ste=True)
    case.activation = activation
    check_case(lambda *a, **k: dsmoe_ext.sparse_ffn(*a, save_activations=False, **k), case)
    x, gates, *weights = case.inputs()
    packed = dsmoe_ext.pack_weights(*weights, activation=activation)
    assert packed.activation == activation
    y = run_case(dsmoe_ext.sparse_ffn, case)["y"]
    torch.testing.assert_close(dsmoe_ext.sparse_ffn(x, gates, packed), y)


def of_one_neuron(g: torch.Tensor, activation: str, save: bool) -> tuple[torch.Tensor, ...]:
    """Value and derivative at every g, from an FFN whose weights are 1 and whose x is g and 1."""
    one = torch.ones(1, 1, dtype=g.dtype)
    weights = (torch.tensor([[1, 0]]).to(g), torch.tensor([[0, 1]]).to(g), torch.ones(1, 2).to(g))
    x = torch.stack([g, torch.ones_like(g)], 1).requires_grad_()
    gates = torch.ones(len(g), 1, dtype=torch.float64 if g.dtype == torch.float64 else None)
    y = dsmoe_ext.sparse_ffn(
        x, gates, *weights, torch.tensor([0, 1]).int(), activation=activation, save_activations=save
    )
    (dx,) = torch.autograd.grad(y[:, 0], x, one.expand(len(g), 1)[:, 0])
    return y[:, 0].detach(), dx[:, 0]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_of_the_line(activation, dtype, seed):
    g = torch.linspace(-40, 40, 8001, dtype=torch.float64).to(dtype)
    ours = of_one_neuron(g, activation, save=True)
    exact = g.double().requires_grad_()
    value = ACTIVATIONS[activation](exact)
    (slope,) = torch.autograd.grad(value.sum(), exact)
    allowed = 4 * torch.finfo(dtype).eps
    error = (ours[0].double() - value).abs() / exact.abs().clamp(min=1)
    assert error.max() <= allowed
    # where 1 - sigmoid is lost in rounding, g times that is; in float64 torch's is rounded, too
    allowed *= 1 if dtype == torch.float32 else 16
    assert ((ours[1].double() - slope).abs() <= allowed * (1 + exact.abs())).all()


@pytest.mark.quick
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_out(activation):
    """No overflow on the way: of the cube in gelu_tanh, of an exponential in the others."""
    g = torch.tensor([-1e25, -1e19, -1e13, 1e13, 1e19, 1e25])
    value, slope = of_one_neuron(g, activation, save=True)
    assert torch.equal(value[3:], g[3:]) and slope[3:].tolist() == [1, 1, 1]
    assert value[:3].abs().max() <= 1e-7 and slope[:3].abs().max() <= 1e-7
    assert all(t.isnan() for t in of_one_neuron(torch.tensor([math.nan]), activation, save=True))


@pytest.mark.quick
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_and_checked(activation, seed):
    case = random_case(seed, 6, 16, [8, 4], active=1.0)
    case = replace(case, activation=activation)
    code = list(ACTIVATIONS).index(activation)
    leaves = [t.requires_grad_() for t in case.inputs()[:5]]
    op = torch.ops.dsmoe.expert_mlp.default
    torch.library.opcheck(op, (*leaves, case.expert_offsets, None, code, True, False))

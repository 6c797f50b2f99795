"""sparse_ffn on weights as models have them: the same bits as on three [I,H] tensors, and gradients
in the layout of the parameters."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import dsmoe_ext
from dsmoe_ext.testing import offsets_of, random_case, run_case

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [16, 16, 16]


def fused(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up], dim=-2)


def by_expert(weight: Tensor) -> Tensor:
    return weight.unflatten(0, (len(SIZES), -1))


@dataclass(frozen=True)
class Layout:
    """Parameters made of [I,H] tensors, and what of them goes to sparse_ffn."""

    parameters: object  # (gate, up, down_t) -> parameters
    arguments: object  # *parameters -> gate_proj, up_proj, down_proj_t
    gives_gradients_in_place: bool = True


LAYOUTS = {
    "down of a Linear": Layout(
        lambda g, u, d: (g, u, d.t().contiguous()), lambda g, u, d: (g, u, d.t())
    ),
    "halves of a fused Linear": Layout(
        lambda g, u, d: (fused(g, u), d.t().contiguous()),
        lambda gu, d: (*gu.chunk(2), d.t()),
    ),
    "fused Linear": Layout(
        lambda g, u, d: (fused(g, u), d.t().contiguous()), lambda gu, d: (gu, None, d.t())
    ),
    "three of experts": Layout(
        lambda g, u, d: (by_expert(g), by_expert(u), by_expert(d)), lambda g, u, d: (g, u, d)
    ),
    "fused experts": Layout(
        lambda g, u, d: (
            fused(by_expert(g), by_expert(u)).contiguous(),
            by_expert(d).transpose(1, 2).contiguous(),
        ),
        lambda gu, d: (gu, None, d.transpose(1, 2)),
    ),
    "halves of fused experts": Layout(
        lambda g, u, d: (fused(by_expert(g), by_expert(u)), by_expert(d).mT.contiguous()),
        lambda gu, d: (*gu.chunk(2, dim=1), d.mT),
    ),
    "rows apart": Layout(
        lambda g, u, d: (torch.cat([g, u, d], dim=1),), lambda gud: gud.chunk(3, dim=1)
    ),
    "gate alone apart": Layout(
        lambda g, u, d: (torch.cat([g, d], dim=1), u), lambda gd, u: (gd[:, :40], u, gd[:, 40:])
    ),
    "columns of all": Layout(
        lambda g, u, d: (g.t().contiguous(), u.t().contiguous(), d.t().contiguous()),
        lambda g, u, d: (g.t(), u.t(), d.t()),
        gives_gradients_in_place=False,
    ),
    "experts last": Layout(
        lambda g, u, d: tuple(by_expert(w).permute(1, 2, 0).contiguous() for w in (g, u, d)),
        lambda *weights: [w.permute(2, 0, 1) for w in weights],
        gives_gradients_in_place=False,
    ),
}


def run_layout(layout: Layout, case, parameters) -> dict[str, Tensor]:
    """y, and gradients of x, gates and the parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in (case.x, case.gates, *parameters)]
    weights = layout.arguments(*leaves[2:])
    y = dsmoe_ext.sparse_ffn(*leaves[:2], *weights, case.expert_offsets)
    gradients = torch.autograd.grad(y, leaves, case.dy)
    if layout.gives_gradients_in_place:
        assert all(gradient.is_contiguous() for gradient in gradients)
    return {"y": y.detach(), "dx": gradients[0], "dgates": gradients[1], "dw": gradients[2:]}


@pytest.mark.quick
@pytest.mark.parametrize("num_tokens", [1, 3, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, dtype, num_tokens, seed):
    layout = LAYOUTS[name]
    case = random_case(seed, num_tokens, 40, SIZES, dtype=dtype)
    weights = case.inputs()[2:5]
    expected = run_case(dsmoe_ext.sparse_ffn, case)
    found = run_layout(layout, case, layout.parameters(*weights))
    for key in ("y", "dx", "dgates"):
        assert torch.equal(found[key], expected[key]), key
    names = ("dgate_proj", "dup_proj", "ddown_proj_t")
    expected_dw = layout.parameters(*(expected[n] for n in names))
    for ours, wanted in zip(found["dw"], expected_dw, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.quick
@pytest.mark.parametrize("sizes", [[32], [7, 1, 0, 40], [0, 0]], ids=str)
@pytest.mark.parametrize("hidden_size", [1, 24, 67])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_down_of_a_linear_with_any_sizes(sizes, hidden_size, dtype, seed):
    layout = LAYOUTS["fused Linear"]
    for num_tokens in (0, 1, 5, 40):
        case = random_case(seed, num_tokens, hidden_size, sizes, dtype=dtype)
        expected = run_case(dsmoe_ext.sparse_ffn, case)
        found = run_layout(layout, case, layout.parameters(*case.inputs()[2:5]))
        assert torch.equal(found["y"], expected["y"]) and torch.equal(found["dx"], expected["dx"])
        assert torch.equal(found["dw"][1], expected["ddown_proj_t"].t())


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_packed(name, dtype, seed):
    layout = LAYOUTS[name]
    case = random_case(seed, 5, 40, SIZES, dtype=dtype)
    x, gates, *weights, offsets = case.inputs()
    expected = dsmoe_ext.pack_weights(*weights, offsets)
    packed = dsmoe_ext.pack_weights(*layout.arguments(*layout.parameters(*weights)), offsets)
    assert torch.equal(packed.data, expected.data)
    assert (packed.hidden_size, packed.intermediate_size) == (40, sum(SIZES))
    assert torch.equal(
        dsmoe_ext.sparse_ffn(x, gates, packed), dsmoe_ext.sparse_ffn(x, gates, expected)
    )


@pytest.mark.quick
@pytest.mark.parametrize("name", LAYOUTS)
def test_opcheck(name, seed):
    layout = LAYOUTS[name]
    case = random_case(seed, 6, 40, SIZES, active=1.0)  # what is kept of other pairs is anything
    leaves = [t.requires_grad_() for t in layout.parameters(*case.inputs()[2:5])]
    inputs = (case.x.requires_grad_(), case.gates.requires_grad_(), *layout.arguments(*leaves))
    op = torch.ops.dsmoe.expert_mlp.default
    torch.library.opcheck(op, (*inputs, case.expert_offsets, None, 0, True, False))


@pytest.mark.parametrize("name", ["fused Linear", "fused experts", "halves of fused experts"])
def test_compiles_into_one_graph(name, seed):
    layout = LAYOUTS[name]
    case = random_case(seed, 6, 40, SIZES)

    def layer(x, *parameters):
        weights = layout.arguments(*parameters)
        return dsmoe_ext.sparse_ffn(x, case.gates, *weights, case.expert_offsets) * 2

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        leaves = [case.x, *layout.parameters(*case.inputs()[2:5])]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        y = function(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, case.dy)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.quick
def test_gradients_that_nobody_needs(seed):
    layout = LAYOUTS["fused experts"]
    case = random_case(seed, 9, 40, SIZES)
    expected = run_layout(layout, case, parameters := layout.parameters(*case.inputs()[2:5]))
    for wanted in (0, 1):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate(parameters)]
        weights = layout.arguments(*leaves)
        y = dsmoe_ext.sparse_ffn(case.x, case.gates, *weights, case.expert_offsets)
        y.backward(case.dy)
        assert torch.equal(leaves[wanted].grad, expected["dw"][wanted])
        assert leaves[1 - wanted].grad is None


BAD = {
    "fused of an odd number": (
        dict(gate_proj=torch.zeros(13, 8), up_proj=None),
        "gate_proj without up_proj holds both, so that 13 neurons",
    ),
    "down beside fused": (
        dict(gate_proj=torch.zeros(10, 8), up_proj=None),
        r"down_proj_t must have shape \[5, 8\], but has \[6, 8\]",
    ),
    "one of experts": (
        dict(up_proj=torch.zeros(2, 3, 8)),
        r"up_proj must have shape \[6, 8\], but has \[2, 3, 8\]",
    ),
    "offsets unequal": (
        dict.fromkeys(("gate_proj", "up_proj", "down_proj_t"), torch.zeros(2, 3, 8)),
        r"must cut weights of shape \[E, S, H\] into experts of 3 neurons",
    ),
    "offsets of other experts": (
        dict.fromkeys(("gate_proj", "up_proj", "down_proj_t"), torch.zeros(3, 2, 8)),
        "expert_offsets cuts 2 experts, but the weights have 3",
    ),
    "one dimension": (dict(gate_proj=torch.zeros(8)), r"must have shape \[I, H\] or \[E, S, H\]"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, message = BAD[name]
    arguments = dict(gate_proj=torch.zeros(6, 8), up_proj=torch.zeros(6, 8))
    arguments |= dict(down_proj_t=torch.zeros(6, 8), expert_offsets=offsets_of([2, 4]))
    with pytest.raises(RuntimeError, match=message):
        dsmoe_ext.sparse_ffn(torch.zeros(4, 8), torch.ones(4, 2), **{**arguments, **change})
    with pytest.raises(RuntimeError, match=message):
        dsmoe_ext.pack_weights(**{**arguments, **change})


@pytest.mark.quick
def test_unknown_activation(seed):
    x, gates, *weights = random_case(seed, 4, 8, [2, 4]).inputs()
    for call in (
        lambda: dsmoe_ext.sparse_ffn(x, gates, *weights, activation="relu"),
        lambda: dsmoe_ext.pack_weights(*weights, activation="relu"),
    ):
        with pytest.raises(
            ValueError, match="activation must be one of silu, gelu_tanh, gelu, but"
        ):
            call()

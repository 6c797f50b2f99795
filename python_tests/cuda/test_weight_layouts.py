"""Weights as models have them, and activations other than silu, on CUDA.

Layouts go through the bindings (on_cuda_kernels.py); the kernels' sums are the same ones, so every
bit is that of plain [I,H] weights. Only decoding reads down_proj as [H,I] in place, and sums in
another order.
"""

import functools

import pytest
import torch
from on_cuda_kernels import cuda_kernels
from ops_under_test import Ops, interpreter_only
from test_expert_mlp_backward import check as check_backward
from test_tf32 import check as check_tf32
from test_tf32 import expect as expect_tf32

from dsmoe_ext import reference, sparse_ffn
from dsmoe_ext.testing import error_bounds, random_case

EXPERTS, SIZE, HIDDEN = 3, 40, 56


def rows_apart(weight):
    """The same numbers, rows further apart, as in a larger matrix."""
    wide = weight.new_zeros(len(weight), weight.shape[1] + 24)
    wide[:, 8 : 8 + weight.shape[1]] = weight
    return wide[:, 8 : 8 + weight.shape[1]]


def misaligned(weight):
    """The same numbers, not at a multiple of 16 bytes: copied."""
    memory = weight.new_zeros(weight.numel() + 1)[1:]
    return memory.view(weight.shape).copy_(weight)


def per_expert(weight):
    return weight.view(EXPERTS, SIZE, -1)


LAYOUTS = {  # (gate_proj, up_proj, down_proj_t) of three [I,H]
    "one after the other": lambda g, u, d: (torch.cat([g, u]), None, d),
    "experts with both": lambda g, u, d: (
        torch.cat([per_expert(g), per_expert(u)], 1), None, per_expert(d),
    ),
    "experts, down as [E,H,S]": lambda g, u, d: (
        per_expert(g), per_expert(u), per_expert(d).transpose(1, 2).contiguous().transpose(1, 2),
    ),
    "down of a Linear": lambda g, u, d: (g, u, d.t().contiguous().t()),
    "rows apart": lambda g, u, d: (rows_apart(g), rows_apart(u), rows_apart(d)),
    "misaligned": lambda g, u, d: tuple(map(misaligned, (g, u, d))),
}  # fmt: skip


def results(case, weights):
    """y of five tokens in inference, then y and gradients of all in training."""
    with torch.no_grad():
        first = sparse_ffn(case.x[:5], case.gates[:5], *weights, case.expert_offsets)
    leaves = [None if w is None else w.detach().requires_grad_() for w in weights]
    x, gates = (t.clone().requires_grad_() for t in (case.x, case.gates))
    y = sparse_ffn(x, gates, *leaves, case.expert_offsets)
    wanted = [x, gates, *(w for w in leaves if w is not None)]
    return [first, y.detach(), *torch.autograd.grad(y, wanted, case.dy)]


IN_PLACE = ("one after the other", "experts with both", "rows apart")
TRANSPOSED = ("experts, down as [E,H,S]", "down of a Linear")
LOOPS = (("80", torch.bfloat16), ("90a", torch.bfloat16), ("80", torch.float32))


def plain(case):
    return case.gate_proj, case.up_proj, case.down_proj_t


@interpreter_only
@pytest.mark.parametrize(
    "layout, arch, dtype",
    [(name, *loop) for name in LAYOUTS for loop in LOOPS[: 3 if name in IN_PLACE else 1]],
    ids=str,
)
def test_layouts_change_no_bit(layout, arch, dtype):
    case = random_case(21, 20, HIDDEN, [SIZE] * EXPERTS, dtype=dtype)
    with cuda_kernels(arch):
        want, got = (results(case, w) for w in (plain(case), LAYOUTS[layout](*plain(case))))
    *most, dgate, dup, ddown = want
    laid = LAYOUTS[layout](dgate, dup, ddown)
    pairs = list(zip([*most, *(t for t in laid if t is not None)], got, strict=True))
    if layout in TRANSPOSED:
        _, decoded = pairs.pop(0)
        exact, bound = error_bounds(case)["y"]
        assert ((decoded.double() - exact[: len(decoded)]).abs() <= bound).all()
    for a, b in pairs:
        assert torch.equal(a, b)


def sizes_of_new_memory(ops):
    """Bytes of everything that the last op allocated."""
    return [b.bytes.size for b in ops.device.memory.buffers.values() if b.writable]


@interpreter_only
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("layout", IN_PLACE)
def test_rows_are_read_in_place(layout, arch):
    """Neither pass makes a copy of weights, and the backward none of gradients but [E,2S,H]'s."""
    case = random_case(21, 20, HIDDEN, [SIZE] * EXPERTS, dtype=torch.bfloat16)
    given = LAYOUTS[layout](*plain(case))
    leaves = [None if w is None else w.detach().requires_grad_() for w in given]
    slab = case.gate_proj.numel() * 2
    with cuda_kernels(arch) as ops:
        y = sparse_ffn(case.x, case.gates, *leaves, case.expert_offsets)
        assert slab not in sizes_of_new_memory(ops)
        gradients = torch.autograd.grad(y, [w for w in leaves if w is not None], case.dy)
        made = sizes_of_new_memory(ops).count(slab)
    if gradients[0].dim() == 2:
        assert made == sum(g.numel() * 2 == slab for g in gradients)


@interpreter_only
@pytest.mark.parametrize("layout", TRANSPOSED)
def test_decoding_copies_no_down_proj(layout):
    case = random_case(21, 16, HIDDEN, [SIZE] * EXPERTS, dtype=torch.bfloat16)
    weights = LAYOUTS[layout](*plain(case))
    with cuda_kernels() as ops, torch.no_grad():
        sparse_ffn(case.x, case.gates, *weights, case.expert_offsets)
        assert case.gate_proj.numel() * 2 not in sizes_of_new_memory(ops)


@functools.cache
def gelu_case(tokens, dtype):
    return random_case(22, tokens, HIDDEN, [72, 16, 40], exact_ste=True, dtype=dtype)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
@pytest.mark.parametrize("arch, dtype", [("80", torch.bfloat16), ("80", torch.float16),
    ("90a", torch.float16), ("80", torch.float32)], ids=str)  # fmt: skip
def test_activations(activation, arch, dtype):
    """Decoding, and forward and backward of more tokens, with g and u kept and recomputed."""
    function = functools.partial(reference.sparse_ffn, activation=activation)
    for tokens, save in ((4, None), (40, True), (40, False)):
        ops, case = Ops(arch=arch), gelu_case(tokens, dtype)
        ops.activation = activation
        bounds = error_bounds(case, function)
        if save is None or not save:
            exact, bound = bounds["y"]
            assert ((ops.sparse_ffn(*case.inputs()).double() - exact).abs() <= bound).all()
        if save is not None:
            check_backward(case, ops, bounds, save_activations=save)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_activations_in_tf32(activation):
    case, ops = gelu_case(40, torch.float32), Ops()
    ops.allow_tf32, ops.activation = True, activation
    function = functools.partial(reference.sparse_ffn, activation=activation)
    check_tf32({"y": ops.sparse_ffn(*case.inputs())}, expect_tf32(case, function))

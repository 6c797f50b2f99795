"""Decoding from codes of 8 and 4 bits on CUDA, against float64 of the weights they stand for."""

import functools
from dataclasses import replace

import pytest
import torch
from end_to_end import cuda
from interpreted import Failed, Interpreter
from ops_under_test import Ops, interpreter_only
from ptx import Counters
from quantized import sparse_ffn

from dsmoe_ext import reference
from dsmoe_ext.decompositions import decompositions
from dsmoe_ext.quantization.codes import MATRICES, quantize_weights
from dsmoe_ext.quantization.experts import QuantizedExperts
from dsmoe_ext.testing import error_bounds, random_case

FORMATS = {
    "8": {"bits": 8},
    "8, groups of 32": {"bits": 8, "group_size": 32},
    "8, groups of 32, mins": {"bits": 8, "group_size": 32, "symmetric": False},
    "4": {"bits": 4},
    "4, symmetric": {"bits": 4, "symmetric": True},
    "4, groups of 64": {"bits": 4, "group_size": 64},
    "4, groups of 192": {"bits": 4, "group_size": 192},
}
# name: (T, H, sizes, active)
EDGES = {
    "one token": (1, 64, [32] * 4, 0.5),
    "none active": (1, 64, [32] * 4, 0.0),
    "one expert": (2, 32, [5], 1.0),
    "nine tokens, off every tile": (9, 96, [13, 29, 7, 1, 3], 0.5),
    "sixteen tokens": (16, 160, [100, 4, 60, 36], 0.4),
    "empty experts": (7, 32, [0, 20, 0, 12, 0], 0.6),
    "shared and fine": (5, 96, [48] + [16] * 7, 0.5),
    "512 experts": (3, 32, [2] * 512, 0.1),
    "longer than a round": (4, 2080, [24, 8], 0.7),
    "no hidden": (3, 0, [16, 72], 0.5),
    "no neuron": (3, 32, [0, 0, 0], 0.5),
    "no token": (0, 32, [16], 0.5),
}


def coded(case, form):
    """(QuantizedWeights, the case with the weights that they stand for, in float64)"""
    weights = quantize_weights(*case.inputs()[2:], activation=case.activation, **form)
    exact = dict(zip(MATRICES, weights.dequantize(torch.float64), strict=True))
    return weights, replace(case, **exact)


def expected(case, form):
    """(QuantizedWeights, y in float64, how far ours may be from it)"""
    weights, exact_case = coded(case, form)
    function = functools.partial(reference.sparse_ffn, activation=case.activation)
    return weights, *error_bounds(exact_case, function)["y"]


def check(case, form, ops, expect=None):
    weights, exact, bound = expect or expected(case, form)
    error = (sparse_ffn(ops, case.x, case.gates, weights).double() - exact).abs()
    assert (error <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_formats(form, dtype):
    """Units that stand alone, groups that an expert cuts short, two strips and more."""
    check(random_case(0, 5, 160, [24, 16, 7, 0, 38], dtype=dtype), FORMATS[form], Ops())


@pytest.mark.parametrize("form", ["8", "4"])
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge, form):
    tokens, hidden, sizes, active = EDGES[edge]
    check(random_case(1, tokens, hidden, sizes, active=active, dtype=torch.bfloat16),
          FORMATS[form], Ops())  # fmt: skip


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
def test_activations(activation):
    case = random_case(2, 4, 64, [24, 40], dtype=torch.float16)
    case.activation = activation
    check(case, FORMATS["4"], Ops())


@pytest.mark.parametrize("form", ["8", "8, groups of 32", "4", "4, symmetric"])
def test_every_code(form):
    """Of float16, in which each code times its scale has a number of its own."""
    low, high = {"8": (-128, 128), "4": (-8, 8)}[form[0]]
    case = random_case(3, 1, 256, [32], active=1.0, dtype=torch.float16)
    weights, _ = coded(case, FORMATS[form])
    codes = torch.arange(low, high, dtype=torch.int8).repeat(32 * 256 // (high - low))
    codes = codes.view(32, 256)
    flipped = {n: replace(getattr(weights, n), codes=codes.roll(i, 0) if i else codes)
               for i, n in enumerate(MATRICES)}  # fmt: skip
    weights = replace(weights, **flipped)
    exact = dict(zip(MATRICES, weights.dequantize(torch.float64), strict=True))
    exact, bound = error_bounds(replace(case, **exact))["y"]
    assert ((sparse_ffn(Ops(), case.x, case.gates, weights).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", ["8", "4"])
def test_scales_of_others_are_never_used(form, bad):
    """Neither of experts that no token uses, nor of a hidden channel but in its own column."""
    case = random_case(4, 3, 96, [5, 13, 8, 17, 3] * 2, active=1.0, dtype=torch.bfloat16)
    case.gates[:, 1::5] = case.gates[:, 4::5] = 0
    weights, _ = coded(case, FORMATS[form])
    want = sparse_ffn(Ops(), case.x, case.gates, weights)
    idle = reference.expand_experts(case.gates, case.expert_offsets)[0] == 0
    weights.gate_proj.scales[idle] = weights.up_proj.scales[idle] = bad
    if weights.group_size:
        groups = torch.cat(
            [torch.full((-(-s // 32),), s in (13, 3)) for s in [5, 13, 8, 17, 3] * 2]
        )
        weights.down_proj_t.scales[groups] = weights.down_proj_t.mins[groups] = bad
    assert torch.equal(sparse_ffn(Ops(), case.x, case.gates, weights), want)
    weights.down_proj_t.scales[..., 7] = bad
    y = sparse_ffn(Ops(), case.x, case.gates, weights)
    assert not y[:, 7].isfinite().any()
    y[:, 7] = want[:, 7]
    assert torch.equal(y, want)


@interpreter_only
@pytest.mark.parametrize("form", ["8", "4"])
def test_same_bits_under_any_schedule(form):
    """The interpreter's memory is poisoned anew each time, too."""
    case = random_case(5, 5, 160, [72, 16, 16, 40], dtype=torch.bfloat16)
    weights, _ = coded(case, FORMATS[form])
    for multiprocessors in (1, 3):
        want = None
        for seed in (None, 0, 1):
            ops = Interpreter(seed=seed, multiprocessors=multiprocessors)
            y = sparse_ffn(ops, case.x, case.gates, weights)
            assert want is None or torch.equal(y, want)
            want = y


class Reads(Counters):
    """Every sector of global memory that a kernel reads, once: what DRAM sends where a CTA's other
    requests for it find it in the caches."""

    def __init__(self):
        super().__init__()
        self.read = set()

    def _sectors(self, ins, warp, addresses, size):
        super()._sectors(ins, warp, addresses, size)
        if ins.op[0] == "ld":
            self.read |= {*(addresses // 32).tolist(), *((addresses + size - 1) // 32).tolist()}


@interpreter_only
def test_traffic():
    """Of all that is read, workspace and x too, 8 bits are half as much as bf16, 4 bits 5 / 16
    (symmetric: 4.5 / 16), but for x and the activations."""
    case = random_case(6, 1, 512, [64] * 4, active=1.0, dtype=torch.bfloat16)
    case.gates[0, 1] = 0
    plain = Reads()
    Interpreter(counters=plain).sparse_ffn(*case.inputs())
    for form, share in {"8": 0.5, "4": 5 / 16, "4, symmetric": 4.5 / 16}.items():
        counters, weights = Reads(), coded(case, FORMATS[form])[0]
        sparse_ffn(Interpreter(counters=counters), case.x, case.gates, weights)
        assert counters.total(counters.cycles).excess == 0
        assert share < len(counters.read) / len(plain.read) < 1.04 * share


@interpreter_only
@pytest.mark.parametrize(
    "form, bits, scales", [("8", 8, 2 * 256 * 4), ("4, symmetric", 4, 12 * 256 * 2)]
)
def test_each_code_is_requested_once(form, bits, scales):
    """And Wd's scales with every 16 neurons of a group, or twice at the end. Of x a lane takes the
    halves of a sector one after the other, for each eight neurons."""
    case = random_case(6, 1, 256, [64] * 4, active=1.0, dtype=torch.bfloat16)
    case.gates[0, 1] = 0
    counters = Counters()
    sparse_ffn(Interpreter(counters=counters), case.x, case.gates, coded(case, FORMATS[form])[0])
    wide = sum(t.units for (where, op), t in counters.sectors.items()
               if op == "ld" and "sm_32" in where and t.units > t.requests)  # fmt: skip
    codes, x = 3 * (64 * 3) * 256 * bits // 8, 2 * 256 * 2 * (64 * 3 // 8)
    assert 32 * wide == codes + x + scales


@interpreter_only
@pytest.mark.parametrize("tokens, hidden, form, dtype", [
    (17, 64, "8", torch.bfloat16), (4, 40, "8", torch.bfloat16), (4, 48, "4", torch.bfloat16),
    (4, 64, "8", torch.float32)], ids=str)  # fmt: skip
def test_what_is_not_decoded_says_so(tokens, hidden, form, dtype):
    case = random_case(7, tokens, hidden, [16], dtype=dtype)
    with pytest.raises(Failed, match="kUnsupported"):
        sparse_ffn(Interpreter(), case.x, case.gates, coded(case, FORMATS[form])[0])


@pytest.mark.parametrize("form", ["8", "4", "4, symmetric"])
def test_through_the_module(form):
    """QuantizedExperts and the bindings' CUDA branch; the op in torch's own; what it refuses."""
    case = random_case(8, 3, 64, [24, 40], dtype=torch.bfloat16)
    weights, _ = coded(case, FORMATS[form])
    want = sparse_ffn(Ops(), case.x, case.gates, weights)
    with cuda() as device, torch.no_grad():
        experts = QuantizedExperts(weights).to(device)
        given = [t.to(device) for t in (case.x, case.gates, case.expert_offsets)]
        assert experts.decodes(given[0]) and not experts.decodes(given[0].repeat(6, 1))
        assert torch.equal(experts.decode(*given).cpu(), want)
        with pytest.raises(RuntimeError, match="at most 16 tokens in bfloat16"):
            experts.decode(given[0].repeat(6, 1), given[1].repeat(6, 1), given[2])
        with pytest.raises(RuntimeError, match="gate_proj must have shape"):
            experts.gate_proj.scales = experts.gate_proj.scales[1:]
            experts.decode(*given)


def test_in_torchs_own():
    class Decoding(torch.nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.experts = QuantizedExperts(weights)
            self.register_buffer("offsets", weights.expert_offsets)

        def forward(self, x, gates):
            return self.experts.decode(x, gates, self.offsets)

    case = random_case(9, 3, 64, [24, 0, 40], dtype=torch.bfloat16)
    for form in ("8", "4"):
        weights, _ = coded(case, FORMATS[form])
        program = torch.export.export(Decoding(weights), (case.x, case.gates))
        y = program.run_decompositions(decompositions()).module()(case.x, case.gates)
        rounded = dict(zip(MATRICES, weights.dequantize(torch.bfloat16), strict=True))
        assert torch.equal(y, reference.sparse_ffn(*replace(case, **rounded).inputs()))

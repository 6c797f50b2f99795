"""Experts of 8 and 4 bits: the kernels against the formula in float64 of the weights that the codes
stand for, by the same rule as other weights; the rounding itself; bad input."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import dsmoe_ext
from dsmoe_ext import _C, ops, reference
from dsmoe_ext.quantization import codes
from dsmoe_ext.quantization.codes import MATRICES, QuantizedMatrix, quantize_weights
from dsmoe_ext.quantization.experts import QuantizedExperts
from dsmoe_ext.quantization.gptq import quantize_with_gram
from dsmoe_ext.testing import error_bounds, random_case

FORMATS = {
    "8": {"bits": 8},
    "8, groups of 32": {"bits": 8, "group_size": 32},
    "4": {"bits": 4},
    "4, symmetric": {"bits": 4, "symmetric": True},
    "4, groups of 128": {"bits": 4, "group_size": 128},
}
# name: (T, H, sizes, active)
EDGES = {
    "no token": (0, 16, [8, 8], 0.5),
    "one token": (1, 64, [32] * 4, 0.5),
    "as many as are multiplied as codes": (12, 130, [65], 1.0),
    "one more": (13, 130, [65], 1.0),
    "none active": (9, 32, [16, 16], 0.0),
    "off every block": (67, 61, [13, 29, 7, 1, 3], 0.5),
    "empty experts": (33, 48, [0, 20, 0, 12, 0], 0.6),
    "shared and fine": (65, 96, [96] + [16] * 18, 0.5),
    "512 experts": (20, 32, [2] * 512, 0.1),
    "several blocks of tokens": (800, 32, [16] * 4, 0.5),
    "hidden size one": (5, 1, [3, 2], 0.5),
    "hidden size zero": (5, 0, [3, 2], 0.5),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized_case(case, form):
    """(the case with the weights that the codes stand for, in float64; packed codes)"""
    quantized = quantize_weights(*case.inputs()[2:], **form)
    weights = dict(zip(MATRICES, quantized.dequantize(torch.float64), strict=True))
    return replace(case, **weights), ops.pack_quantized(quantized)


def in_terms(case, form):
    """The case with |scale code| + |min| for weights: rounding takes part of each, and where the
    two cancel, as in a group of one, the weight itself says nothing about it."""
    quantized = quantize_weights(*case.inputs()[2:], **form)
    terms = {
        name: QuantizedMatrix(
            matrix.codes.short().abs(),
            matrix.scales.abs(),
            None if matrix.mins is None else matrix.mins.abs(),
        )
        for name, matrix in ((name, getattr(quantized, name)) for name in MATRICES)
    }
    weights = replace(quantized, **terms).dequantize(torch.float64)
    return replace(case, **dict(zip(MATRICES, weights, strict=True)))


def block_largest(rows, size):
    """[T,K] -> [T,K]: the largest |element| of each block of `size` along K."""
    blocks = torch.nn.functional.pad(rows.abs(), (0, -rows.shape[1] % size)).unflatten(
        1, (-1, size)
    )
    return blocks.amax(2, keepdim=True).expand(blocks.shape).flatten(1)[:, : rows.shape[1]]


def integer_error(terms, form):
    """How far y may be off because rows of x and of activations become integers (15 bits and a sign
    in half types, 23 in float32) with one scale a block: each is off by part of its block's
    largest."""
    block = 32 if form.get("group_size", 32 if form["bits"] == 4 else 0) == 32 else 64
    c = terms.to(torch.float64)
    x = block_largest(c.x, block) if c.x.shape[1] else c.x
    a = (x @ c.gate_proj.abs().t()) * (x @ c.up_proj.abs().t())
    y = torch.zeros_like(c.x)
    offsets = c.expert_offsets.tolist()
    for e, (begin, end) in enumerate(pairwise(offsets)):
        if end > begin:
            of_expert = block_largest(a[:, begin:end], block) * c.gates[:, e : e + 1].abs()
            y += of_expert @ c.down_proj_t[begin:end].abs()
    return y * 4 * 2.0 ** (-23 if terms.x.dtype == torch.float32 else -15)


def check_quantized(case, form):
    terms = in_terms(case, form)
    case, packed = quantized_case(case, form)
    exact, bound = error_bounds(case)["y"]
    if case.x.dtype == torch.float32:
        bound = error_bounds(terms)["y"][1]
    bound = bound + integer_error(terms, form)
    with torch.no_grad():
        y = dsmoe_ext.sparse_ffn(case.x, case.gates, packed)
    error = (y.double() - exact).abs()
    assert (error <= bound).all(), f"error {error.max():.3g}, {(error - bound).max():.3g} too much"


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge, form, dtype, seed):
    num_tokens, hidden_size, sizes, active = EDGES[edge]
    case = random_case(seed, num_tokens, hidden_size, sizes, active=active, dtype=dtype)
    check_quantized(case, FORMATS[form])


@pytest.fixture(params=dsmoe_ext.build_info()["isas"])
def isa(request):
    """Forces one instruction set after another."""
    in_use = _C.isa()
    _C.force_isa(request.param)
    yield request.param
    _C.force_isa(in_use)


@pytest.mark.parametrize("form", FORMATS)
def test_every_instruction_set(form, isa, seed):
    for dtype in DTYPES:
        for num_tokens in (1, 5, 40):
            case = random_case(seed, num_tokens, 200, [70, 33, 16, 1], dtype=dtype)
            check_quantized(case, FORMATS[form])


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMATS)
def test_outliers(form, seed):
    """Of a block of x one element is a thousand times the others, as in trained models."""
    case = random_case(seed, 6, 192, [64, 64], dtype=torch.bfloat16)
    case.x[:, ::64] *= 1000
    check_quantized(case, FORMATS[form])


@pytest.mark.quick
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_tokens", [1, 30])
def test_what_is_not_finite_shows(num_tokens, bad, seed):
    case = random_case(seed, num_tokens, 70, [40, 30], active=1.0)
    case.x[0, 3] = bad
    _, packed = quantized_case(case, {"bits": 8})
    with torch.no_grad():
        y = dsmoe_ext.sparse_ffn(case.x, case.gates, packed)
    assert not y[0].isfinite().any()
    assert y[1:].isfinite().all()


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMATS)
def test_rounding(form, seed, monkeypatch):
    """Of the full range no weight is further from its code's than half a step (a whole one where
    the code of the other sign is missing); narrower ranges are taken where they leave less."""
    case = random_case(seed, 1, 100, [40, 7, 64])
    weights = case.inputs()[2:]
    best = quantize_weights(*weights, **FORMATS[form])
    monkeypatch.setattr(codes, "_SHRINKS", [1.0])
    full = quantize_weights(*weights, **FORMATS[form])
    steps = replace(full, **{name: ones(getattr(full, name)) for name in MATRICES}).dequantize()
    most = 1.001 if full.group_size else 0.501
    for weight, got, better, step in zip(
        weights, full.dequantize(), best.dequantize(), steps, strict=False
    ):
        error = weight - got
        assert (error.abs() <= most * step.abs() + 1e-3 * weight.abs().max()).all()
        assert (weight - better).norm() <= 1.0001 * error.norm()


def ones(matrix):
    """The matrix whose weights are the steps of this one."""
    return replace(matrix, codes=torch.ones_like(matrix.codes), mins=None)


@pytest.mark.quick
def test_large_channels_leave_small_ones_alone(seed):
    """Trained models have neurons that write a hundred times more into some channels than into
    others (SmolLM2-135M: one scale for such a neuron cost 3 % of perplexity)."""
    case = random_case(seed, 20, 64, [48, 16], active=1.0)
    case.down_proj_t[:, ::16] *= 100
    want = reference.sparse_ffn(*case.to(torch.float64).inputs())
    with torch.no_grad():
        packed = ops.pack_weights(*case.inputs()[2:], bits=8)
        error = dsmoe_ext.sparse_ffn(case.x, case.gates, packed).double() - want
    assert (error.norm(dim=0) < 0.03 * want.norm(dim=0)).all()


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMATS)
def test_tensors_of_a_file(form, seed):
    case = random_case(seed, 1, 33, [40, 7])
    once = quantize_weights(*case.inputs()[2:], **FORMATS[form])
    tensors = dict(codes.to_tensors(once))
    again = codes.from_tensors(
        tensors, once.expert_offsets, hidden_size=33, bits=once.bits, group_size=once.group_size
    )
    for one, other in zip(once.dequantize(), again.dequantize(), strict=True):
        assert torch.equal(one, other)
    if once.bits == 4:
        assert tensors["gate_proj.codes"].shape == (47, 17)


@pytest.mark.quick
def test_pack_weights_with_bits(seed):
    case = random_case(seed, 4, 64, [32, 32], dtype=torch.bfloat16)
    packed = ops.pack_weights(*case.inputs()[2:], bits=4)
    assert (packed.bits, packed.group_size, packed.dtype) == (4, 32, torch.bfloat16)
    full = ops.pack_weights(*case.inputs()[2:])
    assert packed.data.numel() < 0.36 * full.data.numel()
    same = ops.pack_quantized(quantize_weights(*case.inputs()[2:], bits=4))
    assert torch.equal(packed.data, same.data)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"bits": 5}, "bits must be 8 or 4"),
        ({"bits": 4, "group_size": 0}, "4 bits need groups"),
        ({"bits": 8, "group_size": 48}, "group_size must be 32"),
        ({"bits": 8, "group_size": -64}, "group_size must be 32"),
        ({"bits": 4, "group_size": 65536}, "up to 16384"),
        ({"bits": 8, "symmetric": False}, "give a group_size"),
    ],
)
def test_bad_format(form, words, seed):
    with pytest.raises(ValueError, match=words):
        quantize_weights(*random_case(seed, 1, 16, [8]).inputs()[2:], **form)


@pytest.mark.quick
def test_bad_weights(seed):
    case = random_case(seed, 1, 16, [8])
    case.up_proj[3, 3] = float("nan")
    with pytest.raises(ValueError, match="up_proj holds NaN"):
        quantize_weights(*case.inputs()[2:])
    case.up_proj[3, 3] = 1e6
    with pytest.raises(ValueError, match="beyond float16"):
        quantize_weights(*case.inputs()[2:], bits=4)


@pytest.mark.quick
def test_bad_use(seed):
    case = random_case(seed, 4, 64, [32, 32])
    quantized = quantize_weights(*case.inputs()[2:])
    packed = ops.pack_quantized(quantized)
    with pytest.raises(RuntimeError, match="x is float64, but quantized weights take"):
        dsmoe_ext.sparse_ffn(case.x.double(), case.gates.double(), packed)
    with pytest.raises(RuntimeError, match="does not fit"):
        dsmoe_ext.sparse_ffn(case.x, case.gates, replace(packed, data=packed.data[64:]))
    gate = quantized.gate_proj
    for bad, words in [
        (replace(gate, scales=gate.scales[1:]), "must have shape"),
        (replace(gate, scales=gate.scales.half()), "contiguous float32"),
        (replace(gate, codes=gate.codes.short()), "int8"),
        (replace(gate, mins=gate.scales), "mins belong to groups"),
    ]:
        with pytest.raises(RuntimeError, match=words):
            ops.pack_quantized(replace(quantized, gate_proj=bad))


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMATS)
def test_gradients_past_frozen_codes(form, seed):
    """x and gates learn as they would beside the weights that the codes stand for."""
    case = random_case(seed, 21, 64, [32, 40], exact_ste=True)
    quantized = quantize_weights(*case.inputs()[2:], **FORMATS[form])
    experts = QuantizedExperts(quantized)
    results = []
    for run in (
        lambda x, gates: experts.sparse_ffn(x, gates, case.expert_offsets, case.grad_weight),
        lambda x, gates: dsmoe_ext.sparse_ffn(
            x, gates, *quantized.dequantize(), case.expert_offsets, grad_weight=case.grad_weight
        ),
    ):
        x, gates = case.x.clone().requires_grad_(), case.gates.clone().requires_grad_()
        y = run(x, gates)
        results.append((y, *torch.autograd.grad(y, (x, gates), case.dy)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


class OnCuda(torch.Tensor):
    """What says that it lies on a GPU."""

    is_cuda = True


@pytest.mark.quick
@pytest.mark.parametrize(
    ("tokens", "hidden", "dtype", "grad", "decodes"),
    [
        (1, 32, torch.bfloat16, False, True),
        (16, 32, torch.float16, False, True),
        (17, 32, torch.bfloat16, False, False),
        (16, 40, torch.bfloat16, False, False),
        (16, 32, torch.float32, False, False),
        (16, 32, torch.bfloat16, True, False),
    ],
)
def test_what_cuda_decodes_from_codes(tokens, hidden, dtype, grad, decodes, seed, monkeypatch):
    """Few tokens in half types, in inference; all else comes from weights made for the call."""
    case = random_case(seed, tokens, hidden, [16, 24], dtype=dtype)
    experts = QuantizedExperts(quantize_weights(*case.inputs()[2:], bits=8))
    decoded = []
    monkeypatch.setattr(experts, "decode", lambda x, *_: decoded.append(x) or x)
    x = case.x.as_subclass(OnCuda).requires_grad_(grad)
    experts.sparse_ffn(x, case.gates, case.expert_offsets)
    assert bool(decoded) == decodes
    with torch.no_grad():
        experts.sparse_ffn(x, case.gates, case.expert_offsets)
    assert len(decoded) == 2 * decodes + (grad and not decodes)


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMATS)
def test_module_of_codes(form, seed):
    """A cast leaves the codes' numbers alone; an empty module takes a state dict."""
    case = random_case(seed, 1, 33, [40, 7])
    quantized = quantize_weights(*case.inputs()[2:], **FORMATS[form])
    experts = QuantizedExperts(quantized).to(torch.bfloat16)
    again = QuantizedExperts.empty(
        33, [40, 7], bits=quantized.bits, group_size=quantized.group_size,
        symmetric=quantized.gate_proj.mins is None,
    )  # fmt: skip
    again.load_state_dict(experts.state_dict())
    got = again.weights(case.expert_offsets).dequantize()
    for one, other in zip(quantized.dequantize(), got, strict=True):
        assert torch.equal(one, other)
    again.release()
    with pytest.raises(RuntimeError, match="load the model again"):
        again.state_dict()


@pytest.mark.quick
@pytest.mark.parametrize("form", FORMATS)
def test_rounding_that_knows_the_data(form, seed):
    """Where inputs depend on one another the output is nearer than after plain rounding."""
    case = random_case(seed, 400, 96, [40, 24])
    mix = torch.randn(24, 96)
    x = torch.randn(400, 24) @ mix + 0.1 * torch.randn(400, 96)
    a = torch.randn(400, 16) @ torch.randn(16, 64) + 0.1 * torch.randn(400, 64)
    weights = case.inputs()[2:]
    plain = quantize_weights(*weights, **FORMATS[form]).dequantize()
    better = quantize_with_gram(*weights, x.T @ x, a.T @ a, **FORMATS[form]).dequantize()
    for name, seen, weight, one, other in zip(
        MATRICES, (x, x, a), weights, plain, better, strict=False
    ):
        error = [(seen @ ((q - weight) if name == "down_proj_t" else (q - weight).T)).norm()
                 for q in (one, other)]  # fmt: skip
        assert error[1] < 0.8 * error[0], name


# ------------------------------------------------------------------------------- whole models

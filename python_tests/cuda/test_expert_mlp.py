"""expert_mlp's forward on CUDA against dsmoe_ext.reference in float64 (design.md's edge table)."""

import ctypes

import pytest
import torch
from interpreted import SMALL, Failed, Interpreter
from ops_under_test import Ops, interpreter_only
from ptx import Counters

from dsmoe_ext import reference
from dsmoe_ext.cuda_settings import CudaSettings
from dsmoe_ext.testing import error_bounds, random_case

EDGES = {  # name: (T, H, sizes, active)
    "no token": (0, 16, [8, 8], 0.5),
    "none active": (19, 32, [16, 16], 0.0),
    "all active": (70, 64, [32] * 4, 1.0),
    "off every tile": (67, 56, [13, 29, 7, 1, 3], 0.5),
    "unequal": (129, 136, [100, 4, 60, 36], 0.4),
    "empty experts": (33, 48, [0, 20, 0, 12, 0], 0.6),
    "shared and fine": (65, 96, [96] + [16] * 18, 0.5),
    "large between fine": (40, 24, [16, 24, 80, 16, 0, 72, 8], 0.5),
    "one expert": (40, 32, [72], 1.0),
    "512 experts": (17, 8, [2] * 512, 0.1),
    "two chunks": (300, 40, [72, 40, 16], 0.5),
    "more row tiles than a group": (1100, 8, [40], 1.0),
    "wide": (20, 264, [72, 16], 0.7),
    "no hidden": (20, 0, [16, 72], 0.5),
    "no neuron": (20, 24, [0, 0, 0], 0.5),
    "one expert without neurons": (20, 24, [0], 1.0),
}


DECODE = {  # the same, T <= 16
    "one token": (1, 64, [32] * 4, 0.5),
    "one token, all": (1, 64, [32] * 4, 1.0),
    "one token, none": (1, 64, [32] * 4, 0.0),
    "two tokens": (2, 200, [72, 40, 16], 0.5),
    "nine tokens, off every tile": (9, 56, [13, 29, 7, 1, 3], 0.5),
    "sixteen tokens": (16, 136, [100, 4, 60, 36], 0.4),
    "empty experts": (7, 8, [0, 20, 0, 12, 0], 0.6),
    "shared and fine": (5, 96, [96] + [16] * 18, 0.5),
    "512 experts": (3, 16, [2] * 512, 0.1),
    "longer than a warp's loads": (4, 1000, [24, 8], 0.7),
    "no hidden": (3, 0, [16, 72], 0.5),
    "no neuron": (3, 24, [0, 0, 0], 0.5),
    "one expert without neurons": (3, 24, [0], 1.0),
}


def fine_experts(tokens):
    """600 experts of 16 neurons, about 40 pairs of them active, behind one that all tokens use."""
    sizes, dtype = [48] + [16] * 600, torch.bfloat16
    case = random_case(15, tokens, 24, sizes, active=40 / 600 / tokens, dtype=dtype)
    case.gates[:, 0] = 1
    return case


def check(case, ops, bounds=None):
    exact, bound = (bounds or error_bounds(case))["y"]
    assert ((ops.sparse_ffn(*case.inputs()).double() - exact).abs() <= bound).all()


def check_saved(case, ops):
    """Of active pairs, and of no others, g and u are kept; returns y."""
    y = ops.sparse_ffn(*case.inputs(), save_activations=True)
    saved = ops.saved.view(len(case.x), 2, len(case.gate_proj))
    active = reference.expand_experts(case.gates, case.expert_offsets) != 0
    for kept, weight in zip(saved.unbind(1), (case.gate_proj, case.up_proj), strict=True):
        assert torch.equal(kept.isfinite(), active)
        exact = case.x.double() @ weight.double().t()
        torch.testing.assert_close(
            kept[active].double(), exact[active], rtol=2**-8, atol=2**-16 * case.x.shape[1]
        )
    return y


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge):
    tokens, hidden, sizes, active = EDGES[edge]
    check(random_case(0, tokens, hidden, sizes, active=active, dtype=torch.bfloat16), Ops())


@pytest.mark.parametrize("edge", ["off every tile", "unequal", "shared and fine"])
def test_edges_in_float16(edge):
    tokens, hidden, sizes, active = EDGES[edge]
    check(random_case(1, tokens, hidden, sizes, active=active, dtype=torch.float16), Ops())


@pytest.mark.parametrize(
    "edge",
    [
        "no token",
        "none active",
        "off every tile",
        "large between fine",
        "shared and fine",
        "no hidden",
        "no neuron",
    ],
)
def test_edges_in_float32(edge):
    tokens, hidden, sizes, active = EDGES[edge]
    check(random_case(2, tokens, hidden, sizes, active=active, dtype=torch.float32), Ops())


@pytest.mark.parametrize("tokens, sizes", [(1, [32] * 4), (130, [72, 8, 4]), (260, [8, 70])])
def test_float32(tokens, sizes):
    check(random_case(3, tokens, 24, sizes, dtype=torch.float32), Ops())


@pytest.mark.parametrize("tokens, arch", [(1, "80"), (4, "80"), (20, "80"), (20, "90a")])
def test_experts_of_a_calibrated_model(tokens, arch):
    check(fine_experts(tokens), Ops(arch=arch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("edge", DECODE)
def test_decode(edge, dtype):
    tokens, hidden, sizes, active = DECODE[edge]
    check(random_case(0, tokens, hidden, sizes, active=active, dtype=dtype), Ops())


@interpreter_only
@pytest.mark.parametrize("arch", ["80", "90a"])
@pytest.mark.parametrize("tokens, sizes", [(5, [13, 29, 7, 1, 3]), (67, [13, 29, 7, 1, 3, 136]),
                                           (70, [16, 32, 64, 136])])  # fmt: skip
def test_saving_activations_changes_nothing_else(tokens, sizes, arch):
    case = random_case(13, tokens, 56, sizes, dtype=torch.bfloat16)
    y = check_saved(case, Interpreter(arch=arch))
    if tokens > 16:  # else decoding sums in another order
        assert torch.equal(y, Interpreter(arch=arch).sparse_ffn(*case.inputs()))


@interpreter_only
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_without_hidden_size_zeros_are_saved(arch):
    """The backward reads them."""
    case = random_case(13, 20, 0, [13, 16], active=1.0, dtype=torch.bfloat16)
    ops = Interpreter(arch=arch)
    ops.sparse_ffn(*case.inputs(), save_activations=True)
    assert (ops.saved == 0).all()


@pytest.mark.parametrize("dtype, arch, tokens", [
    (torch.float32, "80", 20), (torch.bfloat16, "80", 5), (torch.bfloat16, "80", 20),
    (torch.bfloat16, "90a", 20)], ids=str)  # fmt: skip
def test_an_infinite_gate_meets_no_padding(dtype, arch, tokens):
    """Experts are padded with zeros, of which infinity would make NaN."""
    case = random_case(14, tokens, 16, [1, 9], active=1.0, dtype=dtype)
    for numbers in (case.gate_proj, case.up_proj, case.down_proj_t, case.x):
        numbers.abs_()
    case.gates[3] = float("inf")
    assert (Ops(arch=arch).sparse_ffn(*case.inputs())[3] == float("inf")).all()


@pytest.mark.parametrize("tokens", [16, 17])
def test_infinity_at_an_inactive_pair_stays_there(tokens):
    """Decoding computes inactive pairs of active experts: what they hold must not reach y."""
    case = random_case(8, tokens, 16, [8, 24], active=1.0, dtype=torch.bfloat16)
    case.gates[3, 1], case.gates[5] = 0, 0
    case.up_proj[12] = torch.finfo(torch.bfloat16).max
    case.x[3] = case.x[5] = 1e30
    y = Ops().sparse_ffn(*case.inputs())
    assert y[5].abs().max() == 0


def test_one_expert_takes_all():
    case = random_case(1, 140, 40, [16, 72, 8], active=0.0, dtype=torch.bfloat16)
    case.gates[:, 1] = 0.7
    check(case, Ops())


def test_rows_of_x_further_apart():
    case = random_case(2, 24, 40, [16, 8, 72], dtype=torch.bfloat16)
    wide = torch.zeros(24, 96, dtype=torch.bfloat16)
    wide[:, 16:56] = case.x
    want = Ops().sparse_ffn(*case.inputs())
    case.x = wide[:, 16:56]
    assert torch.equal(Ops().sparse_ffn(*case.inputs()), want)


@pytest.mark.parametrize("tokens", [16, 20])
def test_nan_reaches_the_output_of_its_token_only(tokens):
    case = random_case(3, tokens, 24, [72, 16, 8], active=1.0, dtype=torch.bfloat16)
    case.x[7, 3] = float("nan")
    case.gates[11, 1] = float("nan")
    rows = Ops().sparse_ffn(*case.inputs()).isnan().any(1).nonzero().flatten()
    assert rows.tolist() == [7, 11]


@pytest.mark.parametrize("tokens", [3, 17])
def test_rows_further_apart_than_2_to_the_31(tokens):
    """The last row starts beyond element 2^31; only the pages that are touched exist."""
    case = random_case(4, tokens, 32, [16, 72], active=1.0, dtype=torch.bfloat16)
    want = Ops().sparse_ffn(*case.inputs())
    apart = 2**31 // (tokens - 1) + 64
    far = torch.empty((tokens - 1) * apart + 32, dtype=torch.bfloat16)
    far = far.as_strided((tokens, 32), (apart, 1)).copy_(case.x)
    assert torch.equal(Ops().sparse_ffn(far, *case.inputs()[1:]), want)


@interpreter_only
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("arch", ["90", "120"])
def test_other_architectures_run_the_same_way(arch, tokens):
    """What nvcc makes for them differs in places; the results may not."""
    case = random_case(12, tokens, 56, [72, 13, 16], dtype=torch.bfloat16)
    want = Interpreter().sparse_ffn(*case.inputs())
    assert torch.equal(Interpreter(arch=arch).sparse_ffn(*case.inputs()), want)


@interpreter_only
def test_same_bits_for_any_schedule_and_number_of_multiprocessors():
    case = random_case(4, 90, 136, [72, 16, 16, 40], dtype=torch.bfloat16)
    want = Interpreter().sparse_ffn(*case.inputs())
    for seed, multiprocessors in ((None, 1), (0, 3), (1, 2)):
        ops = Interpreter(seed=seed, multiprocessors=multiprocessors)
        assert torch.equal(ops.sparse_ffn(*case.inputs()), want)


@interpreter_only
@pytest.mark.parametrize("multiprocessors", [1, 3])
def test_decode_under_any_schedule(multiprocessors):
    """The parts of a strip are added by whichever CTA comes last, in the same order."""
    case = random_case(4, 5, 136, [72, 16, 16, 40], dtype=torch.bfloat16)
    want = Interpreter(multiprocessors=multiprocessors).sparse_ffn(*case.inputs())
    for seed in range(3):
        ops = Interpreter(seed=seed, multiprocessors=multiprocessors)
        assert torch.equal(ops.sparse_ffn(*case.inputs()), want)


@interpreter_only
def test_decode_reads_each_weight_once():
    sizes = [64, 64, 64, 64]
    case = random_case(9, 1, 256, sizes, active=1.0, dtype=torch.bfloat16)
    case.gates[0, 1] = 0
    counters = Counters()
    Interpreter(counters=counters).sparse_ffn(*case.inputs())
    loads = [  # by __ldg, of more than the gate or the offset that each lane looks up
        t for (where, op), t in counters.sectors.items()
        if op == "ld" and "sm_32" in where and t.units > t.requests
    ]  # fmt: skip
    weights = 3 * (64 * 3) * 256 * 2 // 32  # sectors of three active experts
    x = 256 * 2 // 32 * (64 * 3 // 8)  # x again for every unit of eight neurons
    assert sum(t.units for t in loads) == weights + x
    assert counters.total(counters.cycles).excess == 0


def test_tokens_in_passes():
    """With a small workspace tokens go in several passes; nothing changes but the memory."""
    case = random_case(5, 520, 16, [400, 40], dtype=torch.bfloat16)
    whole, passes = Ops(arch="80"), Ops(arch="80", **SMALL)
    want = whole.sparse_ffn(*case.inputs())
    assert torch.equal(passes.sparse_ffn(*case.inputs()), want)
    if hasattr(passes, "launches"):
        assert sum("down_kernel" in name for name, *_ in passes.launches) > 1
        assert passes.workspace_bytes < whole.workspace_bytes


@interpreter_only
def test_settings_of_another_thread_wait_for_the_next_call(monkeypatch):
    """A call goes by the settings that its workspace was sized with."""
    case = random_case(5, 520, 16, [400, 40], dtype=torch.bfloat16)
    ops = Interpreter(**SMALL)
    want, passes = ops.sparse_ffn(*case.inputs()), ops.launches.copy()
    size = ops._workspace

    def set_while_sizing(entry, params):
        address = size(entry, params)
        ops._set_settings(CudaSettings())
        return address

    monkeypatch.setattr(ops, "_workspace", set_while_sizing)
    ops.launches.clear()
    assert torch.equal(ops.sparse_ffn(*case.inputs()), want)
    assert [name for name, *_ in ops.launches] == [name for name, *_ in passes]


def test_fewer_multiprocessors_change_no_bit():
    case = random_case(5, 300, 64, [72, 16], dtype=torch.bfloat16)
    want = Ops(multiprocessors=4).sparse_ffn(*case.inputs())
    ops = Ops(multiprocessors=4, sms=3)
    assert torch.equal(ops.sparse_ffn(*case.inputs()), want)
    if hasattr(ops, "launches"):
        grids = [grid[0] for name, grid, *_ in ops.launches if "down_kernel" in name]
        assert grids == [3 * 2]  # two CTAs on each


@interpreter_only
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_few_tokens_share_sums(arch):
    """Under any schedule the parts are added up in the same order, and every CTA has one."""
    case = random_case(5, 40, 136, [72, 13, 200], dtype=torch.bfloat16)
    want = None
    for seed, multiprocessors in ((None, 16), (0, 3), (1, 1)):
        ops = Interpreter(seed=seed, multiprocessors=multiprocessors, arch=arch)
        y = ops.sparse_ffn(*case.inputs())
        assert want is None or torch.equal(y, want)
        want = y
    check(case, Interpreter(arch=arch, parts=3))


@interpreter_only
def test_a_path_that_is_not_there_says_so():
    case = random_case(5, 20, 16, [16], dtype=torch.bfloat16)
    with pytest.raises(Failed, match="kNoSuchPath"):
        Interpreter(path="sm90a").sparse_ffn(*case.inputs())
    fp32 = random_case(5, 20, 16, [16])  # of which there is one path
    Interpreter(path="sm90a").sparse_ffn(*fp32.inputs())
    ops = Interpreter(arch="90a", path="sm80")
    ops.sparse_ffn(*case.inputs())
    assert not any("sm90a" in name for name, *_ in ops.launches)


@interpreter_only
def test_a_failed_launch_has_its_name():
    """What CUDA says reaches the exception, so that a missing kernel and a wild access differ."""
    ops = Interpreter()
    ops._launch = lambda *_: (_ for _ in ()).throw(ValueError("cannot launch"))
    with pytest.raises(ValueError):
        ops.sparse_ffn(*random_case(5, 20, 16, [16], dtype=torch.bfloat16).inputs())
    ops.library.error_name.restype = ctypes.c_char_p
    assert ops.library.error_name() == b"cudaErrorInvalidValue"


SIZES = [(8, 11008, 4096), (512, 8192, 2048), (8, 28672, 8192)]  # E, I, H
SIZES += [(1345, 28672, 8192), (2048, 32768, 4096)]


@interpreter_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_workspace_is_bounded(dtype):
    ops = Interpreter(multiprocessors=132)
    for experts, intermediate, hidden in SIZES:
        for tokens in (1, 8192, 2**20):
            got = ops.forward_workspace(tokens, hidden, intermediate, experts, dtype)
            assert got <= 256 << 20


@interpreter_only
def test_traffic():
    """No bank conflicts; whole sectors: sizes are multiples of the tiles here."""
    case = random_case(6, 256, 128, [128, 64, 32, 32, 16, 16], active=1.0, dtype=torch.bfloat16)
    counters = Counters()
    Interpreter(counters=counters).sparse_ffn(*case.inputs(), save_activations=True)
    assert counters.total(counters.cycles).excess == 0
    for kind in ("cp", "st"):
        moved = counters.total({k: v for k, v in counters.sectors.items() if k[1] == kind})
        assert moved.units <= 1.02 * moved.least, kind


@interpreter_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("hidden, sizes", [(20, [8]), (24, [1] * 2049)], ids=["H", "E"])
def test_what_is_not_supported_says_so(hidden, sizes, dtype):
    with pytest.raises(Failed, match="kUnsupported"):
        Interpreter().sparse_ffn(*random_case(7, 4, hidden, sizes, dtype=dtype).inputs())


@interpreter_only
def test_float32_under_any_schedule_and_without_bank_conflicts():
    case = random_case(4, 70, 24, [72, 16, 16], dtype=torch.float32)
    counters = Counters()
    want = Interpreter(counters=counters).sparse_ffn(*case.inputs())
    assert counters.total(counters.cycles).excess == 0
    for seed, multiprocessors in ((0, 1), (1, 3)):
        ops = Interpreter(seed=seed, multiprocessors=multiprocessors)
        assert torch.equal(ops.sparse_ffn(*case.inputs()), want)

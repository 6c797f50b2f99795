"""The forward's main loop for sm_90a (wgmma, copy engine): the cases of test_expert_mlp.py, and
what is its own. Where there is a Hopper GPU, those cases run this loop anyway."""

import pytest
import torch
from interpreted import Interpreter
from machine_code import readable
from ops_under_test import interpreter_only
from ptx import Counters
from test_expert_mlp import EDGES, check

from dsmoe_ext.testing import random_case

pytestmark = interpreter_only
OWN = {  # tiles of 256 rows in blocks of 64; units of 512 tokens; 64 terms of a sum a step
    "blocks of rows": (200, 72, [130, 40], 0.6),
    "a tile and a row": (257, 136, [64, 80], 1.0),
    "two units": (530, 136, [64, 8, 8, 128], 0.3),
    "a strip of two panels": (300, 264, [72, 40, 16], 0.5),
    "steps without gaps": (66, 200, [64, 64, 16, 16, 16, 16], 0.7),
    # for more steps than there are stages, in every width of tile
    "one warpgroup idles": (50, 328, [16, 32, 64, 328], 0.9),
}


@pytest.mark.parametrize("edge", EDGES | OWN)
def test_edges(edge):
    tokens, hidden, sizes, active = (EDGES | OWN)[edge]
    case = random_case(0, tokens, hidden, sizes, active=active, dtype=torch.bfloat16)
    check(case, Interpreter(arch="90a"))


@pytest.mark.parametrize("edge", ["off every tile", "shared and fine", "blocks of rows"])
def test_edges_in_float16(edge):
    tokens, hidden, sizes, active = (EDGES | OWN)[edge]
    case = random_case(1, tokens, hidden, sizes, active=active, dtype=torch.float16)
    check(case, Interpreter(arch="90a"))


@pytest.mark.parametrize("tokens, hidden, multiprocessors, columns", [
    (40, 72, 2, 64), (40, 200, 1, 128), (300, 128, 1, 128), (40, 136, 1, 192), (300, 264, 2, 192),
])  # fmt: skip
def test_strips(tokens, hidden, multiprocessors, columns):
    """Narrow ones where wide ones would leave multiprocessors idle, or be empty mostly."""
    case = random_case(8, tokens, hidden, [72, 20], active=0.5, dtype=torch.bfloat16)
    ops = Interpreter(arch="90a", multiprocessors=multiprocessors, parts=1)
    check(case, ops)
    names = readable(sorted({name for name, *_ in ops.launches})).values()
    assert f"sm90a::down_kernel<bfloat16,{columns}>" in names


def test_one_expert_takes_all():
    case = random_case(1, 140, 40, [16, 72, 8], active=0.0, dtype=torch.bfloat16)
    case.gates[:, 1] = 0.7
    check(case, Interpreter(arch="90a"))


def test_a_warpgroup_without_rows_keeps_step():
    """Ten steps of one block of rows, then tiles of three: who idles must not run ahead."""
    case = random_case(4, 140, 72, [640, 136, 40], active=0.95, dtype=torch.bfloat16)
    case.gates[30:, 0] = 0
    for seed in (None, 0):
        check(case, Interpreter(arch="90a", seed=seed, multiprocessors=1))


def test_nan_and_infinity_reach_the_output_of_their_token_only():
    case = random_case(3, 20, 24, [72, 16, 8], active=1.0, dtype=torch.bfloat16)
    case.x[7, 3] = float("nan")
    case.gates[11, 1] = float("nan")
    case.gates[3, 1], case.gates[5] = 0, 0
    case.x[5] = 1e30
    y = Interpreter(arch="90a").sparse_ffn(*case.inputs())
    assert y.isnan().any(1).nonzero().flatten().tolist() == [7, 11]
    assert y[5].abs().max() == 0


def test_an_expert_never_sees_its_neighbours_weights():
    """Boxes of rows reach into the next expert, whose numbers may be anything."""
    case = random_case(5, 40, 64, [72, 80], active=1.0, dtype=torch.bfloat16)
    case.gates[:, 1] = 0
    want = Interpreter(arch="90a").sparse_ffn(*case.inputs())
    for weights in (case.gate_proj, case.up_proj, case.down_proj_t):
        weights[72:] = float("nan")
    assert torch.equal(Interpreter(arch="90a").sparse_ffn(*case.inputs()), want)


def test_rows_of_x_further_apart():
    case = random_case(2, 24, 40, [16, 8, 72], dtype=torch.bfloat16)
    want = Interpreter(arch="90a").sparse_ffn(*case.inputs())
    wide = torch.zeros(24, 96, dtype=torch.bfloat16)
    wide[:, 16:56] = case.x
    case.x = wide[:, 16:56]
    assert torch.equal(Interpreter(arch="90a").sparse_ffn(*case.inputs()), want)


def test_same_bits_for_any_schedule_and_number_of_multiprocessors():
    case = random_case(4, 90, 136, [72, 16, 16, 40], dtype=torch.bfloat16)
    want = Interpreter(arch="90a").sparse_ffn(*case.inputs())
    for seed, multiprocessors in ((None, 1), (0, 3), (1, 2), (2, 1)):  # each has its strips
        ops = Interpreter(arch="90a", seed=seed, multiprocessors=multiprocessors)
        assert torch.equal(ops.sparse_ffn(*case.inputs()), want)


@pytest.mark.parametrize("tokens", [130, 300])
def test_halves_of_tiles(tokens):
    """Five tiles of 64 neurons, or ten of up to 256 rows: one of five is halved for 2 and 4
    multiprocessors, all for 11; of ten one for 3, two for 4. Some halves have no row."""
    case = random_case(9, tokens, 72, [72, 40, 80], active=1.0, dtype=torch.bfloat16)
    check(case, Interpreter(arch="90a", multiprocessors=4))
    want = Interpreter(arch="90a", multiprocessors=1).sparse_ffn(*case.inputs())
    for multiprocessors in (2, 3, 4, 11):
        ops = Interpreter(arch="90a", multiprocessors=multiprocessors)
        assert torch.equal(ops.sparse_ffn(*case.inputs()), want)


def test_traffic():
    """No bank conflicts; whole sectors: sizes are multiples of the tiles here."""
    case = random_case(
        6, 256, 128, [192, 128, 64, 32, 32, 16, 16], active=1.0, dtype=torch.bfloat16
    )
    counters = Counters()
    Interpreter(arch="90a", counters=counters).sparse_ffn(*case.inputs())
    assert counters.total(counters.cycles).excess == 0
    for kind in ("cp", "st"):
        moved = counters.total({k: v for k, v in counters.sectors.items() if k[1] == kind})
        assert moved.units <= 1.02 * moved.least, kind


@pytest.mark.parametrize("arch, capability, chosen", [("90a", 90, True), ("90a", 100, False),
                                                      ("90", 90, False)])  # fmt: skip
def test_the_device_decides(arch, capability, chosen):
    """Code for sm_90a runs on compute capability 9.0 alone."""
    ops = Interpreter(arch=arch)
    ops.capability = capability
    check(random_case(7, 20, 24, [72, 16], dtype=torch.bfloat16), ops)
    names = readable(sorted({name for name, *_ in ops.launches})).values()
    assert any("sm90a" in name for name in names) == chosen

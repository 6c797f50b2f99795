"""permute.cu against dsmoe_ext.reference, exactly: the lists are integers."""

import pytest
import torch
from interpreted import Interpreter
from ops_under_test import ON_GPU, Ops
from ptx import Counters

from dsmoe_ext import reference


def random_gates(seed, tokens, experts, active):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, experts, generator=g) < active
    return torch.where(mask, torch.rand(tokens, experts, generator=g) + 0.1, 0.0)


def check(gates, **options):
    got, want = Ops(**options).permute(gates), reference.permute(gates)
    for a, b, name in zip(
        got, want, ("pair_offsets", "token_idx", "token_offsets", "slot_idx"), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("tokens", "experts", "active"),
    [
        (0, 8, 0.5),
        (1, 1, 1.0),
        (1, 8, 0.5),
        (31, 8, 0.4),
        (33, 3, 0.0),
        (300, 1, 0.5),
        (256, 8, 1.0),
        (257, 33, 0.3),
        (600, 40, 0.5),
        (70, 512, 0.1),
        (70, 513, 0.1),
        (3, 1117, 0.5),  # the first to ask for shared memory, by 32 bytes
        (300, 1345, 0.2),
        (33, 2048, 0.5),
        (0, 2048, 0.5),
    ],
)
def test_lists_equal_the_reference(tokens, experts, active):
    check(random_gates(0, tokens, experts, active))


@pytest.mark.parametrize("tokens", [0, 256])
def test_all_pairs_of_the_most_experts_are_active(tokens):
    """A warp finds up to 224 pairs of an expert before its own: just what a byte holds."""
    check(torch.ones(tokens, 2048))


def test_more_experts_are_refused():
    with pytest.raises(RuntimeError, match=r"kUnsupported|at most 2048 experts"):
        Ops().permute(torch.ones(2, 2049))


def test_one_expert_takes_all_and_others_are_empty():
    gates = torch.zeros(290, 5)
    gates[:, 3] = 1
    check(gates)


def test_many_chunks():
    """More chunks than the scan takes in one step."""
    check(random_gates(1, 256 * 33 + 5, 2, 0.3))


def test_any_value_but_zero_is_active():
    gates = torch.tensor([[0.0, -0.0, float("nan")], [-1.0, 1e-45, float("inf")]])
    check(gates)


@pytest.mark.parametrize("seed", range(4))
def test_schedules(seed):
    check(random_gates(2, 520, 9, 0.5), seed=seed)


@pytest.mark.skipif(ON_GPU, reason="asks for what the op does not offer")
@pytest.mark.parametrize("capacity", [1, 100])
def test_nothing_is_written_past_capacity(capacity):
    gates = random_gates(3, 300, 4, 0.5)
    want = reference.permute(gates)
    got = Ops().permute(gates, capacity)
    assert torch.equal(got[0], want[0])  # the offsets still tell what it would have taken
    assert torch.equal(got[1], want[1][:capacity])
    assert torch.equal(got[3], want[3][:capacity])


def test_traffic():
    """gates is read in whole sectors, twice; shared memory has no bank conflict."""
    counters = Counters()
    Interpreter(counters=counters).permute(random_gates(4, 512, 64, 0.5))
    reads = counters.total({k: v for k, v in counters.sectors.items() if k[1] == "ld"})
    gates_sectors = 2 * 512 * 64 * 4 // 32
    assert reads.units < 1.1 * gates_sectors
    assert counters.total(counters.cycles).excess == 0

"""Placing experts on ranks: pairs stay together, parameters and load are even."""

import random
from itertools import product

import pytest

from dsmoe_ext.distributed.placement import in_order, pairs_of, place

pytestmark = pytest.mark.quick
MODSE = [4.5, 0.5, 4, 1, 3, 2, 2.5, 2.5]  # ratios of the paper, large and small in turn


def test_pairs_stay_together():
    sizes = [round(77 * ratio) for ratio in MODSE]
    assert sorted(sorted(pair) for pair in pairs_of(sizes)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    placement = place(sizes, [1.0] * 8, 4)
    assert sorted(placement.ranks) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert placement.imbalance(sizes) <= 1.01 < in_order(8, 4).imbalance(sizes[::2] + sizes[1::2])
    assert len(pairs_of([4] * 8)) == 8 and len(pairs_of([5, 3, 4])) == 3
    assert place(sizes, [1.0] * 8, 8).experts_per_rank == [1] * 8


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_parameters_and_load_are_even(num_ranks, seed):
    """Equal experts with loads as real routing has them: some used ten times as much as others.
    No exchange of two experts takes load off the rank that has most."""
    generator = random.Random(seed)
    sizes = [16] * 72
    loads = [generator.lognormvariate(0, 0.8) for _ in sizes]
    placement = place(sizes, loads, num_ranks)
    assert sorted(placement.order) == list(range(72))
    assert placement.imbalance(sizes) <= 1.05
    totals = placement.totals(loads)
    most = totals.index(max(totals))
    for rank in set(range(num_ranks)) - {most}:
        for a, b in product(placement.ranks[most], placement.ranks[rank]):
            moved = loads[a] - loads[b]
            assert max(totals[most] - moved, totals[rank] + moved) >= totals[most] - 1e-9


def test_small_cases_are_optimal(seed):
    """Against all placements that keep the parameters within the bound."""
    generator = random.Random(seed)
    for _ in range(8):
        sizes = [8] * 6
        loads = [generator.randrange(1, 30) for _ in sizes]
        got = place(sizes, loads, 3)
        best = min(
            max(
                sum(load for load, home in zip(loads, homes, strict=True) if home == r)
                for r in range(3)
            )
            for homes in product(range(3), repeat=6)
            if all(homes.count(r) == 2 for r in range(3))
        )
        assert max(got.totals(loads)) == best and got.experts_per_rank == [2, 2, 2]


def test_bad_input():
    with pytest.raises(ValueError, match="4 experts cannot be placed on 5 ranks"):
        place([1] * 4, [1.0] * 4, 5)
    with pytest.raises(ValueError, match="4 experts but 3 loads"):
        place([1] * 4, [1.0] * 3, 2)
    assert place([4] * 4, [0.0] * 4, 2).imbalance([0.0] * 4) == 1  # nothing measured

"""Which rank owns which experts, so that parameters and work are even (MoDSE's expert-pair
allocation, arXiv 2409.12210, section 3, and then by measured load).

Units come first: a large expert and its small partner stay together, since all pairs have the same
size. Units are then placed by their load, heaviest first, each on the rank that has the least (LPT:
at most 4/3 of the best), among the ranks whose parameters it does not lift above `MAX_PARAMETERS`
times the mean. Exchanges of two units improve that, and of up to `EXACT_UNITS` units the best
placement of all is found. Shared experts are on every rank and not placed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

MAX_PARAMETERS = 1.05  # largest rank's neurons over the mean
EXACT_UNITS = 10  # at most 10^10 / symmetry placements, nearly all cut off by the bound
PAIR_TOLERANCE = 0.02  # rounding of ratios to whole neurons


@dataclass(frozen=True)
class Placement:
    """ranks: the experts of every rank, ascending."""

    ranks: list[list[int]]

    @property
    def order(self) -> list[int]:
        """All experts, rank after rank: the order in which ParallelExperts wants them."""
        return [expert for rank in self.ranks for expert in rank]

    @property
    def experts_per_rank(self) -> list[int]:
        return [len(rank) for rank in self.ranks]

    def totals(self, values: Sequence[float]) -> list[float]:
        """values (neurons, loads) summed by rank."""
        return [sum(values[expert] for expert in rank) for rank in self.ranks]

    def imbalance(self, values: Sequence[float]) -> float:
        """The largest rank over the mean; 1 is even."""
        totals = self.totals(values)
        return max(totals) * len(totals) / sum(totals) if sum(totals) else 1.0


def in_order(num_experts: int, num_ranks: int) -> Placement:
    """What stands without a plan: equally many experts a rank, in order."""
    bounds = [num_experts * rank // num_ranks for rank in range(num_ranks + 1)]
    return Placement([list(range(a, b)) for a, b in pairwise(bounds)])


def pairs_of(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """(large, small) experts if their sizes pair up to the same sum, else every expert alone."""
    by_size = sorted(range(len(sizes)), key=lambda e: (-sizes[e], e))
    half = len(sizes) // 2
    pairs: list[tuple[int, ...]] = [(by_size[i], by_size[-1 - i]) for i in range(half)]
    sums = [sizes[a] + sizes[b] for a, b in pairs]
    paired = len(sizes) % 2 == 0 and sums and sizes[by_size[0]] != sizes[by_size[-1]]
    if paired and max(sums) - min(sums) <= PAIR_TOLERANCE * max(sums):
        return pairs
    return [(expert,) for expert in range(len(sizes))]


def place(sizes: Sequence[int], loads: Sequence[float], num_ranks: int) -> Placement:
    """The placement of experts with sizes [E] (neurons) and loads [E] (neurons times tokens, say).

    An error if not every rank can have an expert.
    """
    if len(loads) != len(sizes):
        raise ValueError(f"{len(sizes)} experts but {len(loads)} loads")
    if not 1 <= num_ranks <= len(sizes):
        raise ValueError(f"{len(sizes)} experts cannot be placed on {num_ranks} ranks")
    units = pairs_of(sizes)
    if len(units) < num_ranks:  # too few pairs for every rank to have one
        units = [(expert,) for expert in range(len(sizes))]
    neurons = [sum(sizes[e] for e in unit) for unit in units]
    work = [sum(loads[e] for e in unit) for unit in units]
    room = max(MAX_PARAMETERS * sum(sizes) / num_ranks, max(neurons))
    homes = _longest_first(neurons, work, num_ranks, room)
    _exchange(homes, neurons, work, num_ranks, room)
    if len(units) <= EXACT_UNITS:
        homes = _best(homes, neurons, work, num_ranks, room)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for unit, home in zip(units, homes, strict=True):
        ranks[home].extend(unit)
    return Placement([sorted(rank) for rank in ranks])


def _longest_first(
    neurons: Sequence[int], work: Sequence[float], num_ranks: int, room: float
) -> list[int]:
    """Heaviest unit first, to the least loaded rank with room; the emptiest if none has."""
    homes, filled, loaded = [0] * len(work), [0.0] * num_ranks, [0.0] * num_ranks
    for unit in sorted(range(len(work)), key=lambda u: (-work[u], -neurons[u], u)):
        fits = [r for r in range(num_ranks) if filled[r] + neurons[unit] <= room]
        if fits:
            rank = min(fits, key=lambda r: (loaded[r], filled[r], r))
        else:
            rank = min(range(num_ranks), key=lambda r: (filled[r], loaded[r], r))
        homes[unit] = rank
        filled[rank] += neurons[unit]
        loaded[rank] += work[unit]
    return homes


def _cost(
    homes: list[int], neurons: Sequence[int], work: Sequence[float], num_ranks: int, room: float
) -> tuple[float, float, float]:
    """What is minimised: parameters above the room, then the largest load, then its spread."""
    filled, loaded = [0.0] * num_ranks, [0.0] * num_ranks
    for unit, rank in enumerate(homes):
        filled[rank] += neurons[unit]
        loaded[rank] += work[unit]
    return max(0.0, max(filled) - room), max(loaded), sum(load * load for load in loaded)


def _exchange(
    homes: list[int], neurons: Sequence[int], work: Sequence[float], num_ranks: int, room: float
) -> None:
    """Swaps two units, or moves one, in place, as long as that improves the cost."""
    best = _cost(homes, neurons, work, num_ranks, room)
    improved = True
    while improved:
        improved = False
        moves = [(u, r) for u in range(len(homes)) for r in range(num_ranks)]
        for a, b in combinations(range(len(homes)), 2):
            if homes[a] != homes[b]:
                homes[a], homes[b] = homes[b], homes[a]
                cost = _cost(homes, neurons, work, num_ranks, room)
                if cost < best:
                    best, improved = cost, True
                else:
                    homes[a], homes[b] = homes[b], homes[a]
        for unit, rank in moves:
            old, homes[unit] = homes[unit], rank
            cost = _cost(homes, neurons, work, num_ranks, room)
            if cost < best:
                best, improved = cost, True
            else:
                homes[unit] = old


def _best(
    homes: list[int], neurons: Sequence[int], work: Sequence[float], num_ranks: int, room: float
) -> list[int]:
    """The placement of lowest cost: depth first, units by work, cut off by the best so far."""
    best, best_cost = list(homes), _cost(homes, neurons, work, num_ranks, room)
    order = sorted(range(len(work)), key=lambda u: (-work[u], -neurons[u], u))
    current = [0] * len(work)
    filled, loaded = [0.0] * num_ranks, [0.0] * num_ranks

    def descend(depth: int, used: int) -> None:
        nonlocal best, best_cost
        if depth == len(order):
            cost = _cost(current, neurons, work, num_ranks, room)
            if cost < best_cost:
                best, best_cost = list(current), cost
            return
        unit = order[depth]
        for rank in range(min(used + 1, num_ranks)):  # empty ranks are all alike
            over = max(0.0, filled[rank] + neurons[unit] - room)
            if (over, loaded[rank] + work[unit]) > best_cost[:2]:
                continue
            current[unit] = rank
            filled[rank] += neurons[unit]
            loaded[rank] += work[unit]
            descend(depth + 1, max(used, rank + 1))
            filled[rank] -= neurons[unit]
            loaded[rank] -= work[unit]

    descend(0, 0)
    return best

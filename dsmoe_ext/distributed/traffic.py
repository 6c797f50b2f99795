"""Bytes that an exchange moves between ranks, counted, and which way moves fewer of them.

    exchange   a token's row to every rank that it uses, with its gates there, and one row back
    gather     a token's row and gates to every rank, and one row back from the reduction

Within one node all links are taken as equal. Between nodes the collectives of `gather` pass a row
to each node once, however many ranks it has, where `exchange` sends it to each rank: so there
`gather` can win, as soon as the tokens use most ranks.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

GATE_BYTES = 4


@dataclass(frozen=True)
class Traffic:
    """Bytes of one forward over all ranks; the backward moves the same once more."""

    exchange: int
    gather: int

    @property
    def prefers_gather(self) -> bool:
        return self.gather < self.exchange


def count_bytes(
    counts: Tensor,
    tokens_per_rank: int,
    row_bytes: int,
    experts_per_rank: list[int],
    ranks_per_node: int | None = None,
) -> Traffic:
    """Over the slowest links: those between nodes, or if there is one node those between ranks.

    counts [W,W]: tokens that go from rank to rank. row_bytes: of one token's H elements.
    ranks_per_node: None: what torchrun says, or all.
    """
    world = len(counts)
    if ranks_per_node is None:
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    node = torch.arange(world) // ranks_per_node
    place = node if world > ranks_per_node else torch.arange(world)
    apart = place[:, None] != place[None, :]
    experts = torch.tensor(experts_per_rank)
    exchange = counts * (2 * row_bytes + GATE_BYTES * experts) * apart
    times = len(place.unique()) - 1  # each token to each other place once
    gathered = times * world * tokens_per_rank
    return Traffic(
        int(exchange.sum()), gathered * (2 * row_bytes + GATE_BYTES * int(experts.sum()))
    )

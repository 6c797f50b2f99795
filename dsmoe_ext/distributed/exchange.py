"""Rows of tokens to the ranks that own their experts, and back.

A token goes at most once to a rank, however many of the rank's experts it uses:

    used[t,r]   token t has a pair on rank r
    dispatch    rank r gets the rows of its tokens: sender after sender, tokens ascending
    combine     y_t = sum over ranks, in rank order, of what they sent back: fixed bits

Each is the other's derivative: dispatching sums gradients as combine sums rows. Within one rank's
part every token stands once, so that no sum depends on the order of threads, on GPUs neither.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsmoe_ext.distributed.gather import all_gather_single


@dataclass(frozen=True)
class Exchange:
    """What goes where in one call. One host sync made it (the counts)."""

    group: dist.ProcessGroup
    tokens_per_rank: list[int]
    send_idx: tuple[Tensor, ...]  # by rank: this rank's tokens [n] that go there, ascending
    receive_counts: tuple[int, ...]  # by rank: tokens that come from there

    @property
    def num_tokens(self) -> int:
        """Of this rank."""
        return self.tokens_per_rank[dist.get_rank(self.group)]

    @property
    def num_received(self) -> int:
        return sum(self.receive_counts)


def plan_exchange(used: Tensor, group: dist.ProcessGroup) -> tuple[Exchange, Tensor]:
    """The exchange of used [T,W] (bool), and how many tokens go from each rank to each, [W,W]."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    mine = torch.cat([used.sum(0), used.new_full((1,), len(used), dtype=torch.int64)])
    everyones = mine.new_empty(world * len(mine))
    all_gather_single(everyones, mine, group=group)
    everyones = everyones.view(world, -1).cpu()
    counts = everyones[:, :world]
    tokens = used.t().nonzero()[:, 1].split(counts[rank].tolist())
    received = tuple(counts[:, rank].tolist())
    return Exchange(group, everyones[:, world].tolist(), tokens, received), counts


def dispatch(rows: Tensor, exchange: Exchange, columns: list[slice] | None = None) -> Tensor:
    """rows [T,N] -> those of the tokens that this rank received [R,n].

    columns: by rank, the part of N that goes there (its experts' gates); None: all of it.
    """
    return _Dispatch.apply(rows, exchange, columns)


def combine(rows: Tensor, exchange: Exchange) -> Tensor:
    """rows [R,N] of the tokens that this rank received -> their sums [T,N] where they came from."""
    return _Combine.apply(rows, exchange)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange, columns: list[slice] | None) -> Tensor:
        ctx.exchange, ctx.columns, ctx.width = exchange, columns, rows.shape[1]
        return _send(rows, exchange, columns)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        return _return(drows, ctx.exchange, ctx.columns, ctx.width), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return _return(rows, exchange, None, rows.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _send(dy, ctx.exchange, None), None


def _send(rows: Tensor, exchange: Exchange, columns: list[slice] | None) -> Tensor:
    rank = dist.get_rank(exchange.group)
    parts = [
        (rows[idx] if columns is None else rows[idx, columns[peer]]).flatten()
        for peer, idx in enumerate(exchange.send_idx)
    ]
    own = rows.shape[1] if columns is None else columns[rank].stop - columns[rank].start
    received = rows.new_empty(exchange.num_received * own)
    dist.all_to_all_single(
        received,
        torch.cat(parts),
        [count * own for count in exchange.receive_counts],
        [part.numel() for part in parts],
        group=exchange.group,
    )
    return received.view(exchange.num_received, own)


def _return(rows: Tensor, exchange: Exchange, columns: list[slice] | None, width: int) -> Tensor:
    own = rows.shape[1]
    widths = [width] * len(exchange.send_idx)
    if columns is not None:
        widths = [part.stop - part.start for part in columns]
    sizes = [len(idx) * n for idx, n in zip(exchange.send_idx, widths, strict=True)]
    back = rows.new_empty(sum(sizes))
    counts = [count * own for count in exchange.receive_counts]
    dist.all_to_all_single(back, rows.flatten(), sizes, counts, group=exchange.group)
    out = rows.new_zeros(exchange.num_tokens, width)
    for peer, part in enumerate(back.split(sizes)):  # in rank order
        target = out if columns is None else out[:, columns[peer]]
        idx = exchange.send_idx[peer]
        target.index_add_(0, idx, part.view(len(idx), widths[peer]))
    return out

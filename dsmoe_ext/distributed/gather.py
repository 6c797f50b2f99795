"""All tokens to all ranks, and partial sums back: the exchange where most tokens go everywhere.

    gather    x [T,N] -> [W·T,N], rank after rank
    reduce    [W·T,N] -> [T,N], summed over ranks in the order that the library's collective has:
              the same bits every time on the same ranks, but not those of exchange.py

Each is the other's derivative. T must be the same on all ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed both.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _Gather.apply(rows, group)


def reduce(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    return _Reduce.apply(rows, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(rows, group)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        return _reduce_scatter(drows, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(rows, group)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        return _all_gather(drows, ctx.group), None


def _all_gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(dist.get_world_size(group) * rows.numel())
    all_gather_single(out, rows.flatten(), group=group)
    return out.view(-1, *rows.shape[1:])


def _reduce_scatter(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(rows.numel() // dist.get_world_size(group))
    reduce_scatter_single(out, rows.flatten(), group=group)
    return out.view(-1, *rows.shape[1:])

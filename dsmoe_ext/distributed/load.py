"""What a model's routing asks of the ranks: measured load, and the rows that travel."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dsmoe_ext.distributed.placement import Placement, in_order, place

if TYPE_CHECKING:
    from dsmoe_ext.ffn import DSMoEFFN


@dataclass(frozen=True)
class RankReport:
    """One layer's routed experts on some ranks. Ratios are the largest rank over the mean."""

    placement: Placement
    parameters: float
    load: float
    ranks_per_token: float  # that a token's rows must reach, its own included where it needs it
    bytes_per_token: float  # sent and received in a forward, for tokens spread evenly over ranks


@torch.no_grad()
def used_experts(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """By layer, which routed experts each token of the windows ids [N,L] used: bool [N·L,R]."""
    from dsmoe_ext.layers import ffn_layers

    ffns = ffn_layers(model)
    used: dict[int, list[Tensor]] = {index: [] for index in range(len(ffns))}

    def note(index: int) -> Callable[..., None]:
        def hook(ffn: "DSMoEFFN", args: Any, y: Tensor) -> None:
            gates = ffn(args[0], return_routing=True)[1].gates
            used[index].append((gates[:, ffn.num_shared :] != 0).cpu())

        return hook

    # A hook that calls its own module would call itself: it is off while it runs.
    handles = [ffn.register_forward_hook(_once_at_a_time(note(i))) for i, ffn in enumerate(ffns)]
    was_training = model.training
    model.eval()
    try:
        for window in ids.split(1):
            model(input_ids=window, use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [torch.cat(used[index]) for index in range(len(ffns))]


def _once_at_a_time(hook: Callable[..., None]) -> Callable[..., None]:
    running = False

    def guarded(*args: Any) -> None:
        nonlocal running
        if not running:
            running = True
            try:
                hook(*args)
            finally:
                running = False

    return guarded


def report(
    used: Tensor, sizes: list[int], placement: Placement, row_bytes: int, gate_bytes: int = 4
) -> RankReport:
    """The report of one layer: used [T,R], sizes [R] of the routed experts."""
    load = (used.sum(0) * torch.tensor(sizes)).tolist()
    on_rank = torch.stack([used[:, rank].any(1) for rank in placement.ranks], 1)
    ranks = on_rank.sum(1).double().mean().item()
    world = len(placement.ranks)
    gates = gate_bytes * len(sizes) / world
    away = ranks * (1 - 1 / world)
    bytes_per_token = away * (2 * row_bytes + gates)
    parameters = placement.imbalance(sizes)
    return RankReport(placement, parameters, placement.imbalance(load), ranks, bytes_per_token)


def before_and_after(
    used: Tensor, sizes: list[int], num_ranks: int, row_bytes: int
) -> tuple[RankReport, RankReport]:
    """Experts in their order, and placed by what half of the tokens used, judged on the others."""
    known, unseen = used[::2], used[1::2]
    load = (known.sum(0) * torch.tensor(sizes)).tolist()
    placed = place(sizes, load, num_ranks)
    plain = in_order(len(sizes), num_ranks)
    return report(unseen, sizes, plain, row_bytes), report(unseen, sizes, placed, row_bytes)
